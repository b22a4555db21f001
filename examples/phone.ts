#!/usr/bin/env -S deno run --quiet --allow-all
// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * A telephone in the terminal, with Asterisk's side of the wire in it: it takes the very text of the dialplan's
 * `ExternalIVR(…)`, runs the program or connects to the server, and shows the call.
 *
 * @module
 */

import { spawn } from "node:child_process";
import { lookup } from "node:dns/promises";
import { closeSync, openSync, readdirSync, readSync, statSync, writeFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { isAbsolute, join, relative, sep } from "node:path";
import process from "node:process";
import { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type Digit, parseEvent, type Sink, type Source } from "../mod.ts";
import {
  Asterisk,
  type CallerAction,
  type Dialplan,
  formatRecording,
  type HostOptions,
  type Note,
  parseDialplan,
  printable,
  transcript,
} from "./asterisk.ts";
import { nodeStreams } from "./menu.ts";

const HELP = `phone.ts: call an IVR from the terminal, as Asterisk's ExternalIVR would

  phone.ts [OPTION]... "ivr://localhost:2949(arg1,arg2),i"
  phone.ts [OPTION]... "/path/program(arg1,arg2),n"

The text is what stands in the dialplan's ExternalIVR(...). Its options: n, do not answer; i, the caller's
hangup is left to the IVR; d, the caller is gone from the start.

  --sound NAME=SECONDS    a playable file and its length; may be repeated
  --sounds DIR            the files of a directory tree: gsm, wav, ulaw, alaw, sln, g722, ...
                          With neither, every name plays a second
  --set NAME=VALUE        a channel variable; may be repeated
  --global NAME=VALUE     a global variable; may be repeated
  --caller "0.5 1, 0.8 23#, 4 hangup"
                          what the caller does by themselves: seconds, then keys or hangup
  --transcript FILE       keeps the call as a recording, written when it ends: replay of testing.ts plays it
  --menu                  call menu.ts beside this file, unless the text names something else
  --help                  this text

In a terminal the keys 0-9 * # a-d are pressed as they are typed; h or Ctrl-C hangs up, and once more
leaves an IVR that does not end the call.
Exit status: 0 when the dialplan would go on, 1 when the call was hung up, 2 for wrong use.`;

/** Wrong use: said in one line, and where to read on. */
function wrong(message: string): never {
  console.error(`phone.ts: ${message}\nTry phone.ts --help`);
  process.exit(2);
}

// ---------------------------------------------------------------------------------------------------------
// Arguments
// ---------------------------------------------------------------------------------------------------------

interface Arguments {
  dialplan: Dialplan;
  host: HostOptions;
  caller: CallerAction[];
  transcript?: string;
}

function readArguments(): Arguments {
  const { values, positionals } = parsed();
  if (values.help) {
    console.log(HELP);
    process.exit(0);
  }
  const menu = `${fileURLToPath(new URL("./menu.ts", import.meta.url))}(sales)`;
  const text = positionals[0] ??
    (values.menu ? menu : wrong("there is nobody to call: name an ivr://host or a /path/program"));
  if (positionals.length > 1) {
    wrong(`one call at a time: "${positionals[1]}" is one too many (are there quotes around the text?)`);
  }

  let dialplan: Dialplan;
  try {
    dialplan = parseDialplan(text);
  } catch (error) {
    wrong((error as Error).message);
  }
  const lengths = pairs("sound", values.sound).map(([name, length]) => {
    const seconds = Number(length);
    if (!(length.trim() && seconds >= 0 && seconds < Infinity)) {
      wrong(`--sound ${name}=${length}: the length has to be in seconds`);
    }
    return [name, seconds] as const;
  });
  const tree = (values.sounds ?? []).map((folder) => readTree(folder));
  const sounds = (file: string) =>
    Object.fromEntries(lengths)[file] ??
      tree.map((find) => find(file)).find((seconds) => seconds !== undefined);
  return {
    dialplan,
    host: {
      ...dialplan,
      sounds: lengths.length || tree.length ? sounds : undefined,
      variables: Object.fromEntries(pairs("set", values.set)),
      globals: Object.fromEntries(pairs("global", values.global)),
    },
    caller: (values.caller ?? []).join().split(",").filter((part) => part.trim()).map(readAction),
    transcript: values.transcript,
  };
}

/** Leaves what is in the file until there is something to replace it. */
function tryToWrite(file: string, text?: string): void {
  try {
    if (text === undefined) closeSync(openSync(file, "a"));
    else writeFileSync(file, text);
  } catch (error) {
    wrong(`--transcript "${file}": ${(error as Error).message}`);
  }
}

function parsed() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        sound: { type: "string", multiple: true },
        sounds: { type: "string", multiple: true },
        set: { type: "string", multiple: true },
        global: { type: "string", multiple: true },
        caller: { type: "string", multiple: true },
        transcript: { type: "string" },
        menu: { type: "boolean" },
        help: { type: "boolean", short: "h" },
      },
    });
  } catch (error) {
    return wrong((error as Error).message);
  }
}

function pairs(option: string, values: string[] = []): [string, string][] {
  return values.map((value) => {
    const at = value.indexOf("=");
    if (at < 1) wrong(`--${option} "${value}": it has to be NAME=VALUE`);
    return [value.slice(0, at), value.slice(at + 1)];
  });
}

function readAction(part: string): CallerAction {
  const [, at, does] = /^\s*(\d+(?:\.\d+)?)\s+(hangup|[0-9A-Da-d*#]+)\s*$/.exec(part) ?? [];
  if (!at || !does) {
    wrong(`--caller "${part.trim()}": it has to be seconds, a blank, and keys or hangup`);
  }
  return does === "hangup" ? [Number(at), "hangup"] : [Number(at), "press", does.toUpperCase()];
}

// ---------------------------------------------------------------------------------------------------------
// Sounds
// ---------------------------------------------------------------------------------------------------------

/** Bytes a second of the formats without a header. */
const RATES: Record<string, number> = {
  gsm: 1650,
  ulaw: 8000,
  ulw: 8000,
  ul: 8000,
  mu: 8000,
  pcm: 8000,
  alaw: 8000,
  al: 8000,
  alw: 8000,
  g722: 8000,
  g729: 1000,
  ilbc: 50 / 0.03,
  siren7: 4000,
  siren14: 6000,
  vox: 4000,
  "g726-16": 2000,
  "g726-24": 3000,
  "g726-32": 4000,
  "g726-40": 5000,
  raw: 16000,
  sln: 16000,
  sln12: 24000,
  sln16: 32000,
  sln24: 48000,
  sln32: 64000,
  sln44: 88200,
  sln48: 96000,
  sln96: 192000,
  sln192: 384000,
};

/** Finds the files of a tree by their names without suffix, absolute or from its root. */
function readTree(folder: string): (file: string) => number | undefined {
  const found = new Map<string, number>();
  try {
    for (const entry of readdirSync(folder, { recursive: true, encoding: "utf8" })) {
      const [, name, suffix] = /^(.*)\.([^.]+)$/.exec(entry) ?? [];
      const seconds = name && suffix && lengthOf(join(folder, entry), suffix);
      if (seconds !== undefined && seconds !== "") {
        found.set(name!.replaceAll(sep, "/"), seconds);
      }
    }
  } catch (error) {
    wrong(`--sounds "${folder}": ${(error as Error).message}`);
  }
  return (file) => found.get(isAbsolute(file) ? relative(folder, file).replaceAll(sep, "/") : file);
}

/** A file's length in seconds; nothing for what is no sound. */
function lengthOf(path: string, suffix: string): number | undefined {
  const rate = Object.hasOwn(RATES, suffix) ? RATES[suffix] : undefined;
  if (rate) return statSync(path).size / rate;
  return /^wav(49|16)?$/i.test(suffix) ? lengthOfWave(path) : undefined;
}

/** A wave file tells its bytes a second in its chunk "fmt ", and their number in the chunk "data". */
function lengthOfWave(path: string): number | undefined {
  const { size } = statSync(path);
  const file = openSync(path, "r");
  try {
    const view = new DataView(new ArrayBuffer(20));
    const id = (at: number) => String.fromCharCode(...new Uint8Array(view.buffer, at, 4));
    let rate = 0;
    for (
      let at = 12;
      readSync(file, view, 0, 20, at) >= 8;
      at += 8 + view.getUint32(4, true) + view.getUint32(4, true) % 2
    ) {
      if (id(0) === "fmt ") rate = view.getUint32(16, true);
      // A recorder that was cut off leaves a length of nothing, or of everything
      if (id(0) === "data") {
        return rate ? Math.min(view.getUint32(4, true) || Infinity, size - at - 8) / rate : undefined;
      }
    }
  } finally {
    closeSync(file);
  }
  return undefined;
}

// ---------------------------------------------------------------------------------------------------------
// The line
// ---------------------------------------------------------------------------------------------------------

interface Line {
  readable: Source;
  writable: Sink;
  stderr?: Source;
}

/** Runs the program or connects to the server. */
async function open({ application, args }: Dialplan): Promise<Line> {
  if (application.startsWith("ivr://")) {
    const socket = await reach(application);
    return nodeStreams(socket, socket);
  }
  const child = spawn(application, args, { stdio: "pipe" });
  await new Promise<void>((resolve, reject) => {
    child.once("spawn", resolve);
    child.once(
      "error",
      (error) => reject(new Error(`Failed to execute '${application}': ${error.message}`)),
    );
  });
  return { ...nodeStreams(child.stdout, child.stdin), stderr: Readable.toWeb(child.stderr) };
}

/** Connects to the first address of a name that answers. */
async function reach(application: string): Promise<Socket> {
  const [, v6, name, port = "2949"] = /^ivr:\/\/(?:\[(.+)\]|([^:]+))(?::(\d+))?$/.exec(application) ?? [];
  const host = v6 ?? name ??
    wrong(`"${application}": it has to be ivr://host[:port]`);
  const addresses = await lookup(host, { all: true }).catch(() => {
    throw new Error(`Unable to locate host '${host}'`);
  });
  for (const { address } of addresses) {
    const socket = connect({ host: address, port: Number(port), noDelay: true });
    const connected = await new Promise<boolean>((resolve) => {
      socket.once("connect", () => resolve(true));
      socket.once("error", () => resolve(false));
    });
    if (connected) return socket;
  }
  throw new Error(
    `Could not connect to any host: ${addresses.map(({ address }) => address).join(", ")} port ${port}`,
  );
}

// ---------------------------------------------------------------------------------------------------------
// The screen
// ---------------------------------------------------------------------------------------------------------

/** What became of a prompt, if an event tells. */
function outcome({ kind, text }: Note): string | undefined {
  const event = parseEvent(kind === "event" ? text : "");
  if (event.type === "failed") return event.reason && `${event.reason} missing`;
  const told = event.type === "finished" || event.type === "interrupted" || event.type === "dropped";
  return told && event.file ? `${event.file} ${event.type}` : undefined;
}

/** What happens, a line each. */
function printPlainly(note: Note): void {
  const line = transcript([note]);
  const told = outcome(note);
  if (line) console.log(told ? `${line}  (${printable(told)})` : line);
}

/** The call as it stands, drawn over and over in the same place. */
class Screen {
  #notes: Note[] = [];
  #height = 0;
  #set: Record<string, string>;
  #title: string;

  constructor(title: string, set: Record<string, string>) {
    this.#title = title;
    this.#set = set;
  }

  add(note: Note): void {
    this.#notes.push(note);
  }

  draw(host: Asterisk): void {
    const width = Math.max(40, process.stdout.columns || 80) - 1;
    // What does not fit could not be drawn over
    const lines = this.#lines(host, width).slice(0, Math.max(1, (process.stdout.rows || 24) - 1))
      .map((line) => fit(line, width));
    const up = this.#height ? `\x1b[${this.#height}A\r` : "";
    process.stdout.write(`${up}${lines.map((line) => `${line}\x1b[K\r\n`).join("")}\x1b[J`);
    this.#height = lines.length;
  }

  #lines(host: Asterisk, width: number): string[] {
    const texts = (kind: Note["kind"]) => this.#notes.filter((note) => note.kind === kind).map(({ text }) => text);
    const set = Object.entries(host.variables).filter(([name, value]) => this.#set[name] !== value);
    const log = texts("log").slice(-6);
    const ended = texts("ends").at(-1);
    const state = ended
      ? ended === "continued" ? "the dialplan goes on" : "hung up"
      : texts("caller").includes("hangs up")
      ? "the caller is gone"
      : host.up
      ? "answered"
      : "ringing";
    const lines = [
      this.#title,
      `  ${state.padEnd(12)} ${host.at.toFixed(1)} s`,
      `  playing      ${this.#bar(host, width - 15)}`,
      `  waiting      ${host.waiting.join("  ") || "-"}`,
      `  heard        ${last(this.#notes.flatMap((note) => outcome(note) ?? []).join("  "), width - 15)}`,
      `  keys         ${
        last(texts("caller").flatMap((text) => /^presses (.)$/.exec(text)?.[1] ?? []).join(" "), width - 15)
      }`,
      ...texts("sends").length ? [`  sent keys    ${texts("sends").join(" ")}`] : [],
      `  set          ${last(set.map((pair) => pair.join("=")).join("  "), width - 15)}`,
      ...log.map((text, i) => `  ${i ? "   " : "log"}          ${text}`),
    ];
    if (ended) return lines;
    return [...lines, state === "the caller is gone" ? "  Ctrl-C leaves" : "  0-9 * # a-d press a key, h hangs up"];
  }

  #bar(host: Asterisk, width: number): string {
    const { playing } = host;
    if (!playing) return "-";
    const { length } = playing;
    const at = Math.min(length, host.at - playing.since);
    const times = ` ${at.toFixed(1)} of ${length.toFixed(1)} s`;
    const size = Math.max(10, Math.min(30, width - playing.file.length - times.length - 3));
    const full = length ? Math.round(at / length * size) : size;
    const file = last(playing.file, Math.max(1, width - size - times.length - 3));
    return `${file} [${"#".repeat(full)}${".".repeat(size - full)}]${times}`;
  }
}

/** The characters that take two columns. */
const WIDE =
  /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\u{1f300}-\u{1faff}\u{20000}-\u{3ffff}]/u;

/** As much of a text as there is room for in columns, and a mark where it was cut. */
function fit(text: string, room: number, cut: "end" | "beginning" = "end"): string {
  const chars = [...printable(text)];
  const columns = (char: string) => WIDE.test(char) ? 2 : 1;
  let width = chars.reduce((sum, char) => sum + columns(char), 0);
  if (width <= room) return chars.join("");
  while (width > room - 1 && chars.length) width -= columns((cut === "end" ? chars.pop() : chars.shift())!);
  return cut === "end" ? `${chars.join("")}…` : `…${chars.join("")}`;
}

/** The latest there is room for. */
function last(text: string, room: number): string {
  return fit(text || "-", room, "beginning");
}

// ---------------------------------------------------------------------------------------------------------
// The call
// ---------------------------------------------------------------------------------------------------------

async function call(
  { dialplan, host: options, caller, transcript: file }: Arguments,
): Promise<number> {
  if (file !== undefined) tryToWrite(file);
  let line: Line;
  try {
    line = await open(dialplan);
  } catch (error) {
    console.error((error as Error).message);
    process.exit(1);
  }
  const { stdin, stdout } = process;
  const screen = stdout.isTTY
    ? new Screen([dialplan.application, ...dialplan.args].join("  "), options.variables ?? {})
    : undefined;
  const host = new Asterisk(line, {
    ...options,
    onNote: (note) => screen ? screen.add(note) : printPlainly(note),
  });
  host.plan(caller);
  let hungUp = false;
  const hangUp = () => {
    if (hungUp) leave(1);
    hungUp = true;
    host.hangUp();
  };
  const leave = (status: number): never => {
    if (stdin.isTTY) stdin.setRawMode(false);
    if (file !== undefined) tryToWrite(file, formatRecording(host.recording()));
    process.exit(status);
  };
  process.on("SIGINT", hangUp).on("SIGTERM", hangUp);
  stdout.on("error", () => leave(1)); // nobody reads on: `phone.ts … | head`
  if (stdin.isTTY) {
    stdin.setRawMode(true);
    stdin.setEncoding("utf8").on("data", (typed) => {
      if (String(typed).startsWith("\x1b")) return; // an arrow or a function key
      for (const key of String(typed)) {
        if ("hH\x03".includes(key)) hangUp();
        else if (/^[0-9*#a-d]$/i.test(key)) host.press(key.toUpperCase() as Digit);
      }
    });
  }
  const drawing = screen && setInterval(() => screen.draw(host), 100);
  const left = await host.left;
  clearInterval(drawing);
  screen?.draw(host);
  return leave(left === "continued" ? 0 : 1);
}

if (import.meta.main) await call(readArguments());
