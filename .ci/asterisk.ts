// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Places calls in the live Asterisk that `.ci/live` started, on Deno, Node and Bun, and any number of them at once.
 *
 * Calls are placed through Asterisk's manager interface. What it logs comes from its log, where every line bears the
 * number of its call. Texts hold bytes as the characters U+0000 to U+00FF, as recordings do.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { connect, type Socket } from "node:net";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import type { CallerAction } from "../examples/asterisk.ts";

/** Where the live Asterisk is, if there is one: `ami://USER:SECRET@HOST:PORT/PATH/OF/LOG`. */
export const place: string | undefined = process.env["ASTERISK_LIVE"];

/** What a call is like. */
export interface LiveOptions {
  /** The channel's variables. */
  variables?: Record<string, string>;
  /** The variables, and functions like `CALLERID(name)`, whose values are asked for when the call is over. */
  names?: string[];
  /** Whether the call is hung up before the application begins, as for ExternalIVR's option `d`. */
  dead?: boolean;
}

/** What became of a call. */
export interface Over {
  /** Where it went from the application: on in the dialplan, or nowhere. */
  left: "continued" | "hungup";
  /** What the application logged, `CONTINUED` and `HUNGUP`, as in recordings. */
  log: string[];
  /** All that Asterisk logged for the call: `LEVEL file.c: text`. */
  lines: string[];
  /** The values of the names that were asked for; empty for those that are not set. */
  variables: Record<string, string>;
}

type Message = Record<string, string>;

/** From the press of a key until it arrives, while it is held, and to the next key: milliseconds. */
const ARRIVES = 100;
const HELD = 100;
const NEXT_KEY = 250;

/** How long Asterisk may take to begin a call, and to log that it is over, in milliseconds. */
const PATIENCE = 10_000;

let placed = 0;

/** A connection to the live Asterisk. */
export class Live {
  #socket: Socket;
  #log: Log;
  #asked: { resolve: (answer: Message) => void; reject: (error: Error) => void }[] = [];
  /** Who hears what happens to a channel, and nothing when the connection is lost. */
  #listeners = new Map<string, (event?: Message) => void>();
  #open = new Set<LiveCall>();

  private constructor(socket: Socket, log: Log) {
    this.#socket = socket;
    this.#log = log;
    let text = "";
    socket.setEncoding("latin1").on("data", (data) => {
      const messages = (text + data).split("\r\n\r\n");
      text = messages.pop()!;
      for (const message of messages) this.#receive(message);
    });
    socket.on("close", () => {
      for (const { reject } of this.#asked) reject(lost());
      for (const listener of this.#listeners.values()) listener();
    });
  }

  /** Connects to where {@linkcode place} says. */
  static async connect(): Promise<Live> {
    const { hostname, port, username, password, pathname } = new URL(place!);
    const socket = connect({ host: hostname, port: Number(port), noDelay: true });
    await new Promise<void>((resolve, reject) => socket.once("connect", resolve).once("error", reject));
    socket.on("error", () => {}); // closes it as well
    const live = new Live(socket, new Log(pathname));
    await live.act("Login", { Username: username, Secret: password });
    return live;
  }

  /**
   * Places a call that runs an application, written as in the dialplan: `ExternalIVR(ivr://localhost(arg),i)`. Resolves
   * when the application is about to begin.
   */
  async call(application: string, { variables, names = [], dead = false }: LiveOptions = {}): Promise<LiveCall> {
    const id = `${process.pid}-${++placed}`;
    const began = Promise.withResolvers<string>();
    const gone = Promise.withResolvers<void>();
    const values: Record<string, string> = {};
    let channels = 2;
    const listener = (event?: Message) => {
      if (!event) [began, gone].forEach(({ reject }) => reject(lost()));
      else if (event.UserEvent === "Began") began.resolve(event.Log!);
      else if (event.UserEvent === "Variable") values[decode(event.Name!)] = decode(event.Value!);
      else if (event.Event === "Hangup" && --channels === 0) gone.resolve();
    };
    this.#listeners.set(`${id}-called`, listener).set(`${id}-caller`, listener);
    await this.act("Originate", {
      Channel: `Local/s@${dead ? "dead" : "called"}`,
      OtherChannelId: `${id}-called`,
      ChannelId: `${id}-caller`,
      Context: "caller",
      Exten: dead ? "gone" : "s",
      Priority: "1",
      Async: "true",
      Timeout: "86400000",
    }, { ...variables, LIVE_APPLICATION: application, LIVE_NAMES: names.join() });
    const timer = setTimeout(() => began.reject(new Error(`The call of ${application} did not begin`)), PATIENCE);
    const number = await began.promise.finally(() => clearTimeout(timer));
    const over = gone.promise.then(async (): Promise<Over> => {
      const lines = await this.#log.of(number);
      const log = lines.flatMap(recorded);
      return { left: log.includes("CONTINUED") ? "continued" : "hungup", log, lines, variables: values };
    });
    const call = new LiveCall(this, id, over);
    this.#open.add(call);
    over.catch(() => {}).then(() => this.#open.delete(call));
    return call;
  }

  /** Sets a global variable. */
  async setGlobal(name: string, value: string): Promise<void> {
    await this.act("Setvar", { Variable: name, Value: value });
  }

  /** How many channels there are, whoever placed their calls. */
  async channels(): Promise<number> {
    return Number((await this.act("CoreStatus")).CoreCurrentCalls);
  }

  /** Asterisk's version. */
  async version(): Promise<string> {
    return (await this.act("CoreSettings")).AsteriskVersion!;
  }

  /** Has the manager do something, and gives its answer. */
  act(action: string, fields: Message = {}, variables: Message = {}): Promise<Message> {
    const headers = Object.entries({ Action: action, ...fields });
    for (const [name, value] of Object.entries(variables)) {
      headers.push(["Variable", `${name}=${value}`.replace(/[\\",()]/g, "\\$&")]);
    }
    return new Promise((resolve, reject) => {
      if (this.#socket.destroyed) throw lost();
      for (const [name, value] of headers) {
        if (name.length + value.length > 1000) {
          throw new RangeError(`Cannot send ${name}: Asterisk takes 1,000 characters`);
        }
      }
      this.#asked.push({ resolve, reject });
      this.#socket.write(headers.map((header) => `${header.join(": ")}\r\n`).join("") + "\r\n", "latin1");
    });
  }

  /** Hangs up what goes on, and disconnects. */
  async close(): Promise<void> {
    await Promise.all([...this.#open].map((call) => call.hangUp()));
    const closed = new Promise((resolve) => this.#socket.once("close", resolve));
    this.#socket.end();
    await closed;
    this.#log.close();
  }

  #receive(text: string): void {
    const message: Message = {};
    for (const line of text.split("\r\n")) {
      const [, name, value] = /^([\w-]+): ?(.*)$/s.exec(line) ?? [];
      if (name) message[name] = value!;
    }
    if (!message.Response) return this.#listeners.get(message.Uniqueid!)?.(message);
    const { resolve, reject } = this.#asked.shift()!; // answers come in turn
    if (message.Response === "Success") resolve(message);
    else reject(new Error(`Asterisk refused: ${message.Message}`));
  }
}

/** A call in the live Asterisk. */
export class LiveCall {
  /** Resolves when both ends have hung up. */
  readonly over: Promise<Over>;
  #live: Live;
  #id: string;
  #gone = new AbortController();

  /** What {@linkcode Live.call} makes. */
  constructor(live: Live, id: string, over: Promise<Over>) {
    this.#live = live;
    this.#id = id;
    this.over = over;
    over.catch(() => {}).then(() => this.#gone.abort());
  }

  /** Does what a caller does, from now on or from an earlier time. Resolves when all is done, or the call is over. */
  async plan(caller: readonly CallerAction[], began: number = performance.now()): Promise<void> {
    await Promise.all(caller.map(async ([at, does, keys]) => {
      if (!await this.#until(began + at * 1000)) return;
      await (does === "press" ? this.press(keys) : this.hangUp());
    }));
  }

  /** Presses keys, each held for 100 ms, and 150 ms between them. Resolves when the last is released. */
  async press(keys: string): Promise<void> {
    let at = performance.now() + ARRIVES;
    for (const key of keys) {
      if (!await this.#until(at)) return;
      await this.#try("PlayDTMF", {
        Channel: `${this.#id}-called`,
        Digit: key,
        Duration: String(HELD),
        Receive: "true",
      });
      at += NEXT_KEY;
    }
    await this.#until(at - NEXT_KEY + HELD);
  }

  /** Hangs up. */
  async hangUp(): Promise<void> {
    await this.#try("Hangup", { Channel: `${this.#id}-caller` });
  }

  /** The value of a variable, while the call goes on. */
  async get(name: string): Promise<string> {
    return (await this.#live.act("Getvar", { Channel: `${this.#id}-called`, Variable: name })).Value!;
  }

  /** Waits for a time, unless the call is over first. */
  #until(time: number): Promise<boolean> {
    return sleep(Math.max(0, time - performance.now()), true, { signal: this.#gone.signal }).catch(() => false);
  }

  /** Does something to a channel that may be gone. */
  async #try(action: string, fields: Message): Promise<void> {
    await this.#live.act(action, fields).catch((error) => {
      if (!/channel/i.test(error.message)) throw error;
    });
  }
}

/** Asterisk's log, from now on, by the number of the call. */
class Log {
  #file: number;
  #position: number;
  #rest = "";
  #lines = new Map<string | undefined, string[]>();
  #last: string[] = [];

  constructor(path: string) {
    this.#file = openSync(path, "r");
    this.#position = fstatSync(this.#file).size;
  }

  /** All lines of a call, when it is over. */
  async of(number: string): Promise<string[]> {
    for (const began = performance.now(); performance.now() - began < PATIENCE; await sleep(5)) {
      this.#read();
      const lines = this.#lines.get(number);
      if (lines?.includes("VERBOSE app_verbose.c: HUNGUP")) return lines;
    }
    throw new Error(`Asterisk did not log the end of the call ${number}`);
  }

  close(): void {
    closeSync(this.#file);
  }

  #read(): void {
    const chunk = Buffer.alloc(65536);
    for (let size; (size = readSync(this.#file, chunk, 0, chunk.length, this.#position)); this.#position += size) {
      const lines = (this.#rest + chunk.toString("latin1", 0, size)).split("\n");
      this.#rest = lines.pop()!;
      for (const line of lines) {
        const [, level, number, text] = /^\[[\d.]+\] (\w+)\[\d+\](\[C-\w+\])? (.*)$/s.exec(line) ?? [];
        if (!level) this.#last.push(`${this.#last.pop()}\n${line}`); // a text of several lines
        else {
          this.#last = this.#lines.get(number) ?? [];
          this.#lines.set(number, this.#last);
          this.#last.push(`${level} ${text}`);
        }
      }
    }
  }
}

/** What recordings tell of a line of the log, if anything. */
function recorded(line: string, i: number, lines: string[]): string[] {
  const [, level, file, text] = /^(\w+) (\S*): (.*)$/s.exec(line)!; // a backtrace comes from no file
  if (file === "app_verbose.c") return [text!];
  if (file === "app.c") return level === "WARNING" ? [text!] : []; // of keys to be sent
  if (file !== "app_externalivr.c") return [];
  // The keys to be sent are logged as they came, and as they were read
  const sends = text!.startsWith("Sending DTMF: ") && !lines[i - 1]!.includes(": got command '");
  if (level === "VERBOSE") return sends ? [text!] : [];
  // Older ones misspell a word
  const told = text!.replace(/^\S+;2: /, "").replace(/^(e'X'it command is) depricated/, "$1 deprecated");
  // Behind what could not be opened is some earlier error
  return [told.replace(/^(File '.*' could not be opened): .*/s, "$1")];
}

function decode(text: string): string {
  return text.replace(/%(..)/g, (_, hex) => String.fromCharCode(parseInt(hex, 16)));
}

function lost(): Error {
  return new Error("The live Asterisk is gone");
}
