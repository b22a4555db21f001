// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Asterisk's side of the wire, over any pair of streams: to try an IVR without a telephone, or to build what calls one.
 *
 * To test an IVR see `@externalivr/protocol/testing`, which places calls with this in a time of their own.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { Ivr } from "@externalivr/protocol";
 * import { Asterisk } from "@externalivr/protocol/asterisk";
 *
 * const events = new TransformStream<Uint8Array, Uint8Array>();
 * const commands = new TransformStream<Uint8Array, Uint8Array>();
 * const host = new Asterisk({ readable: commands.readable, writable: events.writable });
 * const ivr = new Ivr({ readable: events.readable, writable: commands.writable });
 * await ivr.exit();
 * assert.deepEqual(await host.left, "continued");
 * ```
 *
 * @module
 */

import {
  type Bytes,
  type Digit,
  formatEvent,
  type IvrEvent,
  lines,
  parseCommand,
  type Sink,
  type Source,
} from "../mod.ts";

// ---------------------------------------------------------------------------------------------------------
// Clocks
// ---------------------------------------------------------------------------------------------------------

/** Where a call's time comes from. Milliseconds throughout. */
export interface Clock {
  /** The time, from any fixed point. */
  now(): number;
  /** Runs something later. */
  setTimeout(run: () => void, ms: number): unknown;
  /** Does not run it after all. */
  clearTimeout(timer: unknown): void;
}

/** The time of the wall, for calls over real streams. */
export const realClock: Clock = {
  now: () => performance.now(),
  setTimeout: (run, ms) => setTimeout(run, ms),
  clearTimeout: (timer) => clearTimeout(timer as number),
};

// ---------------------------------------------------------------------------------------------------------
// The host
// ---------------------------------------------------------------------------------------------------------

/** The dialplan's call of `ExternalIVR`. */
export interface Dialplan {
  /** The program's path or `ivr://host[:port]`. */
  application: string;
  /** Its arguments. */
  args: string[];
  /** The letters behind the comma: `n`, `i`, `d`. */
  options: string;
}

/** Something that happened in a call, for transcripts and screens. */
export interface Note {
  /** Seconds since the call began. */
  at: number;
  /**
   * `event` and `command` are lines of the wire, `log` is Asterisk's log; the others tell of the call: what plays now,
   * what the caller does, what is pressed toward the caller.
   */
  kind:
    | "event"
    | "command"
    | "log"
    | "plays"
    | "answers"
    | "caller"
    | "sends"
    | "ends";
  /** What it was. */
  text: string;
}

/** What the host is like. */
export interface HostOptions extends Partial<Dialplan> {
  /** The playable files and their lengths in seconds. Without it every name plays a second. */
  sounds?: Record<string, number> | ((file: string) => number | undefined);
  /** Files that exist and cannot be opened: they are skipped without an event. */
  unreadable?: string[];
  /** The channel's variables. */
  variables?: Record<string, string>;
  /** The global variables. */
  globals?: Record<string, string>;
  /** Whether the channel can be answered, for the option `n`. The default is `true`. */
  answerable?: boolean;
  /**
   * Asterisk's version: before 15 a burst does not stall, before 11 there is no `I`, before 1.8 no `D` and no data on `T`
   * and `Z`. The default is 22.
   */
  version?: number;
  /** The Unix time, in seconds, when the call begins. The default is now. */
  epoch?: number;
  /** How texts become bytes: `"latin1"` for any bytes as the characters U+0000 to U+00FF. The default is `"utf-8"`. */
  encoding?: "utf-8" | "latin1";
  /** The default is {@linkcode realClock}. */
  clock?: Clock;
  /** Called with everything that happens. */
  onNote?: (note: Note) => void;
}

/** How a call left `ExternalIVR`: `continued` in the dialplan, or `hungup`. */
export type Left = "continued" | "hungup";

/** What a caller does, when: seconds since the call began. */
export type CallerAction = readonly [at: number, does: "press", keys: string] | readonly [at: number, does: "hangup"];

/** What is playing. */
export interface Playing {
  /** The file. */
  file: string;
  /** When it began, by the call's clock, in milliseconds. */
  since: number;
  /** How long it is, in milliseconds. */
  length: number;
}

/** From the press of a key to its event, and to the next key: seconds. */
const KEY = 0.2;
const NEXT_KEY = 0.25;
/** Asterisk looks at the playlist with every frame of audio: milliseconds. */
const FRAME = 20;
/** How long Asterisk takes to look at what arrived, in milliseconds: what comes within it arrives together. */
const REACTION = 0.2;
/**
 * One call in Asterisk's `ExternalIVR`, as strict as the real one: short commands are ignored, long ones cut, a burst
 * stalls, a `D` or half a line blocks everything else.
 */
export class Asterisk {
  /** The channel's variables, and functions like `CALLERID(name)`, as they are now. */
  readonly variables: Record<string, string>;
  /** The global variables. */
  readonly globals: Record<string, string>;
  /** Asterisk's log. */
  readonly log: string[] = [];
  /** The files that were asked for and exist, and their lengths in seconds. */
  readonly found: Map<string, number> = new Map();
  /** Settles when the call has left `ExternalIVR`. */
  readonly left: Promise<Left>;

  #options: HostOptions;
  #clock: Clock;
  #began: number;
  #epoch: number;
  #version: number;
  #reader: ReturnType<Source["getReader"]>;
  #writer: ReturnType<Sink["getWriter"]>;
  #leave!: (left: Left) => void;

  // The channel
  #up: boolean;
  #gone: boolean;
  #over = false;
  #autoclear = false;
  #playlist: string[] = [];
  #playing?: Playing;
  #aborted = false;
  #frame: unknown;

  // The stream of commands: what is in the socket, what Asterisk has read of it, the line it is at
  #socket = "";
  #buffer = "";
  #line = "";
  #end = false;
  #reacting: unknown;
  /** A `D` that goes on: its timer, and the events that wait for its end. */
  #busy?: { timer: unknown; held: (() => void)[] };
  /** What the caller does while Asterisk waits for the rest of a line. */
  #deferred: (() => void)[] = [];
  #planned: unknown[] = [];

  /** Begins a call over the IVR's streams: `readable` brings its commands, `writable` takes the events. */
  constructor(
    streams: { readable: Source; writable: Sink; stderr?: Source },
    options: HostOptions = {},
  ) {
    this.#options = options;
    this.#clock = options.clock ?? realClock;
    this.#version = options.version ?? 22;
    this.#began = this.#clock.now();
    this.#epoch = options.epoch ?? Date.now() / 1000;
    this.variables = { ...options.variables };
    this.globals = { ...options.globals };
    this.left = new Promise((resolve) => this.#leave = resolve);
    this.#up = !this.#has("n");
    this.#gone = this.#has("d");
    this.#reader = streams.readable.getReader();
    this.#writer = streams.writable.getWriter();
    if (this.#up) this.#note("answers", "");
    this.#read();
    if (streams.stderr) this.#readErrors(streams.stderr);
  }

  /** Seconds since the call began. */
  get at(): number {
    return (this.#clock.now() - this.#began) / 1000;
  }

  /** Whether the channel is answered. */
  get up(): boolean {
    return this.#up;
  }

  /** Whether the call has left `ExternalIVR`. */
  get over(): boolean {
    return this.#over;
  }

  /** What plays now; `undefined` is silence. */
  get playing(): Playing | undefined {
    return this.#playing;
  }

  /** What waits in the playlist, in order. */
  get waiting(): string[] {
    return this.#playing && !this.#aborted ? this.#playlist.slice(1) : [...this.#playlist];
  }

  /**
   * The caller releases a key. A key pressed while a `D` goes on is lost, as Asterisk loses it.
   *
   * @throws {TypeError} for a key that does not exist.
   */
  press(key: Digit): void {
    checkKey(key);
    if (this.#line) return void this.#deferred.push(() => this.press(key));
    if (this.#over || this.#gone || !this.#up) return;
    this.#note("caller", `presses ${key}`);
    if (this.#busy) return;
    this.#emit({ type: "dtmf", digit: key });
    if (this.#autoclear) this.#clear();
  }

  /** The caller hangs up. */
  hangUp(): void {
    if (this.#line) return void this.#deferred.push(() => this.hangUp());
    if (this.#over || this.#gone) return;
    this.#note("caller", "hangs up");
    this.#gone = true;
    this.#clock.clearTimeout(this.#frame);
    this.#playing = undefined;
    if (this.#busy) this.#unblock();
    if (!this.#has("i")) {
      this.#emit({ type: "hangup" });
      return this.#finish("hungup");
    }
    this.#emit({ type: "inform", message: "HANGUP" });
    this.#service();
  }

  /**
   * Has the caller do things by themselves: `[at, "press", keys]` and `[at, "hangup"]`, in seconds since the call began.
   * A key is held for 100 ms, and Asterisk tells of it 100 ms after that; the next follows 150 ms after the release.
   * Returns when the last of them is done.
   *
   * @throws {TypeError} for a key that does not exist.
   */
  plan(caller: CallerAction[]): number {
    let last = 0;
    const act = (at: number, run: () => void) => {
      last = Math.max(last, at);
      if (at <= this.at) run();
      else this.#planned.push(this.#clock.setTimeout(run, (at - this.at) * 1000));
    };
    for (const [at, does, keys = ""] of caller) {
      if (does === "hangup") act(at, () => this.hangUp());
      else if (does !== "press") throw new TypeError(`Cannot plan "${does}": a caller can press and hangup`);
      for (const [i, key] of [...keys.toUpperCase()].entries()) {
        checkKey(key);
        act(at + KEY + i * NEXT_KEY, () => this.press(key as Digit));
      }
    }
    return last;
  }

  #has(option: string): boolean {
    return (this.#options.options ?? "").includes(option);
  }

  #note(kind: Note["kind"], text: string): void {
    this.#options.onNote?.({ at: this.at, kind, text });
  }

  #logs(text: string): void {
    this.log.push(text);
    this.#note("log", text);
  }

  /**
   * Writes an event, once Asterisk is not busy. Data that may be any bytes stands for the "=" in it: Asterisk cuts a reply
   * anywhere and lets a newline in a value pass, and no codec would.
   */
  #emit(event: Untimed, data?: string): void {
    if (this.#busy) return void this.#busy.held.push(() => this.#emit(event, data));
    const timestamp = Math.floor(this.#epoch + this.at) | 0;
    const line = this.#bytes(formatEvent({ ...event, timestamp } as IvrEvent));
    this.#send(data === undefined ? line : line.replace("=\n", () => data + "\n"));
  }

  /** Writes an event that names a file, if this version does. */
  #emitFile(type: "finished" | "interrupted" | "dropped" | "failed", file: string): void {
    if (this.#version < 1.8 && (type === "interrupted" || type === "failed")) return this.#emit({ type });
    this.#emit(type === "failed" ? { type, reason: "=" } : { type, file: "=" }, this.#bytes(file));
  }

  #send(line: string): void {
    this.#note("event", this.#text(line.slice(0, -1)));
    this.#writer.write(toBytes(line)).catch(() => {});
  }

  /** A text as its bytes, each a character; and back. */
  #bytes(text: string): string {
    return this.#options.encoding === "latin1" ? text : utf8Bytes(text);
  }

  #text(bytes: string): string {
    return this.#options.encoding === "latin1" ? bytes : new TextDecoder().decode(toBytes(bytes));
  }

  #finish(left: Left): void {
    if (this.#over) return;
    this.#over = true;
    this.#clock.clearTimeout(this.#frame);
    this.#clock.clearTimeout(this.#reacting);
    this.#clock.clearTimeout(this.#busy?.timer);
    for (const timer of this.#planned) this.#clock.clearTimeout(timer);
    this.#playing = undefined;
    this.#playlist = [];
    this.#note("ends", left);
    this.#writer.close().catch(() => {}).then(() => this.#reader.cancel())
      .catch(() => {});
    this.#leave(left);
  }

  // The playlist -------------------------------------------------------------------------------------------

  #lengthOf(file: string): number | undefined {
    const { sounds, unreadable } = this.#options;
    const own = typeof sounds === "function"
      ? sounds(file)
      : Object.entries(sounds ?? { [file]: 1 }).find(([name]) => name === file)?.[1];
    const length = own ?? (unreadable?.includes(file) ? 0 : undefined);
    if (length !== undefined) this.found.set(file, length);
    return length;
  }

  /** What `I`, `S` and, with autoclear, a key do. Until the next frame Asterisk does not know that it stopped. */
  #clear(): void {
    const playing = this.#playing && !this.#aborted ? this.#playlist.shift() : undefined;
    if (playing !== undefined) this.#emitFile("interrupted", playing);
    for (const file of this.#playlist.splice(0)) this.#emitFile("dropped", file);
    if (this.#playing) this.#aborted = true;
    this.#look();
  }

  /** Looks at the playlist with the next frame, unless something plays on. */
  #look(): void {
    if (this.#playing && !this.#aborted) return;
    this.#clock.clearTimeout(this.#frame);
    this.#frame = this.#clock.setTimeout(() => this.#next(), FRAME);
  }

  #next(): void {
    this.#aborted = false;
    this.#playing = undefined;
    for (let file; (file = this.#playlist[0]) !== undefined; this.#playlist.shift()) {
      if (this.#options.unreadable?.includes(file)) {
        this.#logs(`File '${file}' could not be opened`);
        continue;
      }
      const length = this.found.get(file)! * 1000; // known since it was queued
      this.#playing = { file, since: this.#clock.now(), length };
      this.#note("plays", file);
      this.#frame = this.#clock.setTimeout(() => this.#finished(file), length);
      return;
    }
  }

  #finished(file: string): void {
    this.#playlist.shift();
    this.#next();
    this.#emitFile("finished", file);
  }

  // The commands -------------------------------------------------------------------------------------------

  async #read(): Promise<void> {
    try {
      for (;;) {
        const { done, value } = await this.#reader.read();
        if (done) break;
        this.#socket += fromBytes(value!);
        this.#react();
      }
    } catch { /* a reset is an end */ }
    this.#end = true;
    this.#react();
  }

  async #readErrors(stderr: Source): Promise<void> {
    try {
      for await (const line of lines(stderr)) {
        this.#logs(`stderr: ${line.trim()}`);
      }
    } catch { /* the program is gone */ }
  }

  #react(): void {
    if (this.#over) return;
    this.#reacting ??= this.#clock.setTimeout(() => {
      this.#reacting = undefined;
      this.#service();
    }, REACTION);
  }

  /**
   * Carries out a line for each look at a socket that has something: so what Asterisk 15 and later have read already
   * waits for more.
   */
  #service(): void {
    const stalls = this.#version >= 15;
    while (!this.#over && !this.#busy) {
      if (!this.#socket && !this.#end && (stalls || !this.#buffer.includes("\n"))) return;
      const line = this.#gets();
      if (line === undefined) {
        if (!this.#end) return; // blocked until the rest of the line comes
        this.#logs("Child process went away");
        return this.#finish("hungup");
      }
      this.#carryOut(line);
      for (const act of this.#deferred.splice(0)) act();
    }
  }

  /** The next line, at most 1023 bytes of it; what is left is the next line. */
  #gets(): string | undefined {
    for (;;) {
      const room = 1023 - this.#line.length;
      const newline = this.#buffer.indexOf("\n") + 1;
      if (newline || this.#buffer.length >= room) {
        const size = Math.min(newline || room, room);
        const line = this.#line + this.#buffer.slice(0, size);
        this.#line = "";
        this.#buffer = this.#buffer.slice(size);
        return line;
      }
      this.#line += this.#buffer;
      this.#buffer = this.#socket.slice(0, 2048);
      this.#socket = this.#socket.slice(2048);
      if (!this.#buffer) {
        const rest = this.#line;
        if (this.#end) this.#line = "";
        return this.#end && rest ? rest : undefined;
      }
    }
  }

  #carryOut(bytes: string): void {
    const line = this.#text(bytes);
    const command = parseCommand(line);
    const text = line.replace(/\0.*$/s, "").replace(/\n$/, "").trimEnd();
    if (!text) return;
    this.#note("command", text);
    if (this.#version < 1.8 && this.#bytes(text).length < 4) return;
    switch (command.type) {
      case "play":
        return this.#checked(`Queue re'S'et`, command.file, () => {
          this.#clear();
          this.#playlist.push(command.file);
        });
      case "queue":
        return this.#checked(`Queue 'A'ppend`, command.file, () => {
          this.#playlist.push(command.file);
          this.#look();
        });
      case "interrupt":
        if (this.#version < 11) return;
        return this.#checked(`Queue 'I'nterrupt`, undefined, () => this.#clear());
      case "autoclear":
        return this.#checked("Option", undefined, () => this.#autoclear = command.on);
      case "answer":
        if (this.#up) return;
        if (this.#has("d") || this.#options.answerable === false) {
          this.#logs("Failed to answer channel");
          return this.#emit({ type: "failed", reason: "ANSWER_FAILURE" });
        }
        this.#up = true;
        return this.#note("answers", "");
      case "dtmf":
        return this.#press(command.digits, command.interval || 250, command.duration ?? 0);
      case "set":
        for (const [name, value] of Object.entries(command.variables)) {
          const key = name.endsWith(")") ? name : name.replace(/^__?/, "");
          Object.defineProperty(this.variables, key, {
            value,
            writable: true,
            enumerable: true,
            configurable: true,
          });
        }
        return;
      case "get":
        return this.#emit({ type: "variables", data: "=" }, this.#get(command.names));
      case "params": {
        const { application = "ivr://localhost", args = [] } = this.#options;
        return this.#emit({ type: "params", params: ["="] }, this.#bytes([application, ...args].join()));
      }
      case "log":
        return this.#logs(`Log message from EIVR: ${command.message}`);
      case "hangup":
        this.#logs(`Hanging up: ${command.message}`);
        this.#emit({ type: "hangup" });
        return this.#finish("hungup");
      case "exit":
        this.#logs(`Exiting: ${command.message}`);
        if (text[0] === "X") {
          this.#logs("e'X'it command is deprecated, use 'E'xit instead");
        } else this.#emit({ type: "exit" });
        return this.#finish("continued");
      case "unknown":
        if (/^D../s.test(text)) {
          const [keys = "", interval, duration] = text.slice(2).split(",");
          this.#press(keys, Number.parseInt(interval!) || 250, Number.parseInt(duration!) || 0);
        } else if (/^O../s.test(text)) {
          this.#checked(
            "Option",
            undefined,
            () => this.#logs(`Unknown option requested: ${text.slice(2)}`),
          );
        }
    }
  }

  /** Carries out what needs an answered channel, and a file that exists. */
  #checked(what: string, file: string | undefined, act: () => void): void {
    if (!this.#up || this.#gone) {
      this.#logs(`${what} called on unanswered channel`);
      return this.#emit({ type: "failed" });
    }
    if (file !== undefined && this.#lengthOf(file) === undefined) {
      this.#logs(`Unknown file requested '${file}'`);
      return this.#emitFile("failed", file);
    }
    act();
  }

  /** Presses keys toward the caller, and does nothing else meanwhile. */
  #press(keys: string, interval: number, duration: number): void {
    if (this.#version < 1.8) return;
    this.#logs(`Sending DTMF: ${keys} ${interval} ${duration}`);
    if (this.#gone) return;
    this.#note("sends", keys);
    const pauses = [...keys].map((key) => key === "w" ? 500 : key === "W" ? 1000 : Math.max(duration, 100) + interval);
    const timer = this.#clock.setTimeout(() => this.#unblock(), pauses.reduce((sum, ms) => sum + ms, 100));
    this.#busy = { timer, held: [] };
  }

  #unblock(): void {
    const { timer, held } = this.#busy!;
    this.#clock.clearTimeout(timer);
    this.#busy = undefined;
    for (const emit of held) emit();
    this.#react();
  }

  /** Channel variables before globals, no functions, cut as Asterisk's buffer cuts. */
  #get(names: string[]): string {
    const value = (name: string) => {
      if (name.endsWith(")")) return "";
      const place = [this.variables, this.globals].find((place) => Object.hasOwn(place, name));
      return place?.[name] ?? "";
    };
    const data = names.map((name) => `${name}=${value(name)},`).join("");
    return this.#bytes(data).slice(0, 2047).replace(/,$/, "");
  }
}

function checkKey(key: string): void {
  if (!/^[0-9A-D*#]$/.test(key)) throw new TypeError(`Cannot press "${key}": the keys are 0-9 * # A-D`);
}

type Untimed = IvrEvent extends infer E ? E extends { timestamp: number } ? Omit<E, "timestamp"> : never
  : never;

function utf8Bytes(text: string): string {
  return fromBytes(new TextEncoder().encode(text));
}

function toBytes(text: string): Bytes {
  return Uint8Array.from(text, (char) => char.charCodeAt(0));
}

function fromBytes(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

/**
 * Reads the text of the dialplan's `ExternalIVR(…)`: `command[(arg1,arg2,…)][,options]`. As in Asterisk the whole text loses
 * its quotes and backslashes before the arguments are split: they do not keep a comma inside of an argument.
 *
 * @throws {SyntaxError} for text that Asterisk would not run.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { parseDialplan } from "@externalivr/protocol/asterisk";
 *
 * assert.deepEqual(parseDialplan("ivr://localhost(sales,2),in"), {
 *   application: "ivr://localhost",
 *   args: ["sales", "2"],
 *   options: "in",
 * });
 * ```
 */
export function parseDialplan(text: string): Dialplan {
  const [command = "", options = ""] = split(text);
  const open = command.indexOf("(");
  const close = command.lastIndexOf(")");
  if (open >= 0 && close < open) {
    throw new SyntaxError(`Cannot read "${text}": the closing parenthesis is missing`);
  }
  const application = open < 0 ? command : command.slice(0, open);
  if (!application) {
    throw new SyntaxError(`Cannot read "${text}": no program and no ivr://host`);
  }
  const unknown = /[^nid]/.exec(options);
  if (unknown) {
    throw new SyntaxError(`Cannot read "${text}": the options are n, i and d, not "${unknown[0]}"`);
  }
  return { application, args: open < 0 || close === open + 1 ? [] : split(command.slice(open + 1, close)), options };
}

/** Splits at commas outside of parentheses, brackets and quotes, as the dialplan does; a backslash takes the next as it is. */
function split(text: string): string[] {
  const parts = [""];
  let depth = 0;
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    let char = text[i]!;
    if (char === '"') quoted = !quoted;
    else {
      if (char === "\\") char = text[++i] ?? "";
      else if (char === "(" || char === "[") depth++;
      else if ((char === ")" || char === "]") && depth) depth--;
      if (char === "," && !depth && !quoted) parts.push("");
      else parts[parts.length - 1] += char;
    }
  }
  return parts;
}

/** Whether a line of the wire only serves to acknowledge a command of a {@linkcode Session}. */
export function isAcknowledgement(line: string): boolean {
  return /^G,(?: *-?\d+,)?EIVR_ACK_\d+=?$/.test(line);
}
