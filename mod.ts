// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Telephone menus for Asterisk's dialplan application `ExternalIVR`, in one file without dependencies.
 *
 * Asterisk runs a program or connects to a TCP server for one call, sends it *events* as lines (keys pressed,
 * prompts finished, the caller gone) and carries out the *commands* that come back (play, queue, set a
 * variable, hang up). This module parses and formats both, and {@linkcode Session} holds the conversation over
 * any pair of streams.
 *
 * @example A menu
 * ```ts
 * import { Session, type Sink, type Source } from "@externalivr/protocol";
 *
 * async function answer(streams: { readable: Source; writable: Sink }) {
 *   const ivr = new Session(streams);
 *   const { digits } = await ivr.gather({ prompt: "vm-enter-num-to-call", maxDigits: 4 });
 *   if (digits) await ivr.set({ ACCOUNT: digits });
 *   await ivr.exit();
 * }
 * ```
 *
 * @module
 */

// ---------------------------------------------------------------------------------------------------------
// 1. Events: Asterisk to application, `tag,timestamp[,data]`
// ---------------------------------------------------------------------------------------------------------

/** A key of the telephone. */
export type Digit = "0" | "1" | "2" | "3" | "4" | "5" | "6" | "7" | "8" | "9" | "A" | "B" | "C" | "D" | "*" | "#";

/**
 * What Asterisk tells. `timestamp` is in Unix seconds, as Asterisk counts them: in 32 bits, negative from 2038.
 *
 * - `dtmf`: the caller released a key.
 * - `finished` (`F`), `interrupted` (`T`), `dropped` (`D`): what became of a file of the playlist: it played to its
 *   end, was stopped while it played (before Asterisk 1.8 without its name), or was removed before its turn.
 * - `failed` (`Z`): a command was refused. `reason` is the file that does not exist, `ANSWER_FAILURE` or
 *   `GENERATOR_FAILURE`; there is none when the channel is not answered or already hung up.
 * - `params` (`P`): the application and its arguments. Commas inside an argument are not escaped, so they split it.
 * - `variables` (`G`): `name=value,…`, to be read with {@linkcode parseVariables}.
 * - `inform` (`I`): with the dialplan's option `i`, `HANGUP` says that the caller is gone and the call still ours to end.
 * - `hangup` (`H`), `exit` (`E`): the call left the application; the stream ends.
 * - `unknown`: every other line, as it came, without its line break.
 */
export type IvrEvent =
  | { type: "dtmf"; timestamp: number; digit: Digit }
  | { type: "finished"; timestamp: number; file: string }
  | { type: "interrupted"; timestamp: number; file?: string }
  | { type: "dropped"; timestamp: number; file: string }
  | { type: "failed"; timestamp: number; reason?: string }
  | { type: "params"; timestamp: number; params: string[] }
  | { type: "variables"; timestamp: number; data: string }
  | { type: "inform"; timestamp: number; message: string }
  | { type: "hangup"; timestamp: number }
  | { type: "exit"; timestamp: number }
  | { type: "unknown"; line: string };

/** What went wrong, for programs: see {@linkcode IvrError}. */
export type IvrErrorCode = "refused" | "ended" | "invalid" | "too-long" | "overflow" | "truncated" | "aborted";

/**
 * The one error of this module. `code` tells what went wrong:
 *
 * - `invalid`, `too-long`: a value that the wire cannot carry. Nothing was sent. (`too-long` also ends a session
 *   whose peer sends a line without end.)
 * - `refused`: Asterisk answered the command with `Z`.
 * - `ended`: the call ended before the command was known to be carried out.
 * - `truncated`: Asterisk cut the reply to `G`; `partial` holds what came.
 * - `overflow`: more events waited than {@linkcode SessionOptions.maxQueue}.
 * - `aborted`: the reason of a {@linkcode Session.signal} that was aborted by the caller hanging up.
 */
export class IvrError extends Error {
  /** Always `"IvrError"`. */
  override name = "IvrError";
  /** What went wrong. */
  code: IvrErrorCode;
  /** With `truncated`: the variables as they came, the last bytes missing. */
  declare partial?: Record<string, string>;

  /** Makes an error with a code, a message, and perhaps the error behind it. */
  constructor(code: IvrErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}

const DIGITS = "0123456789*#ABCD";

/** What stands between the commas of each event: its tag, which for a key is the key, and its fields. */
const EVENTS: Record<IvrEvent["type"], string> = {
  dtmf: "digit,timestamp",
  finished: "F,timestamp,file",
  interrupted: "T,timestamp,file",
  dropped: "D,timestamp,file",
  failed: "Z,timestamp,reason",
  params: "P,timestamp,params",
  variables: "G,timestamp,data",
  inform: "I,timestamp,message",
  hangup: "H,timestamp",
  exit: "E,timestamp",
  unknown: "line",
};

/**
 * Reads one line from Asterisk, with or without its `\n` or `\r\n`. Never throws: what it does not understand is
 * `unknown`.
 *
 * Only the first two commas separate; data is raw. `D` is the key D without data and a dropped file with it.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { parseEvent } from "@externalivr/protocol";
 *
 * assert.deepEqual(parseEvent("D,1795372496"), { type: "dtmf", timestamp: 1795372496, digit: "D" });
 * assert.deepEqual(parseEvent("D,1795372496,beep"), { type: "dropped", timestamp: 1795372496, file: "beep" });
 * ```
 */
export function parseEvent(line: string): IvrEvent {
  line = chomp(line);
  return eventIn(line, 0, line.length);
}

function chomp(line: string): string {
  return line.endsWith("\n") ? line.replace(/\r?\n$/, "") : line;
}

/** Reads the line that stands between two places of a text, so that nobody has to cut it out first. */
function eventIn(text: string, from: number, to: number): IvrEvent {
  let at = from + 2;
  while (text[at] === " ") at++; // "%10d" pads with blanks on the left
  const sign = text[at] === "-" ? -1 : 1;
  if (sign < 0) at++;
  const start = at;
  let timestamp = 0;
  // Never past the end: where a code was once read there, JavaScriptCore reads all of them more slowly
  for (; at < to; at++) {
    const digit = text.charCodeAt(at) - 48;
    if (digit < 0 || digit > 9) break;
    timestamp = timestamp * 10 + sign * digit;
  }
  if (at > start && text[from + 1] === "," && Number.isSafeInteger(timestamp)) {
    const tag = text[from]!;
    if (at === to) {
      if (DIGITS.includes(tag)) return { type: "dtmf", timestamp, digit: tag as Digit };
      switch (tag) {
        case "T":
          return { type: "interrupted", timestamp };
        case "Z":
          return { type: "failed", timestamp };
        case "H":
          return { type: "hangup", timestamp };
        case "E":
          return { type: "exit", timestamp };
      }
    } else if (text[at] === "," && ++at < to) {
      const data = text.slice(at, to);
      switch (tag) {
        case "F":
          return { type: "finished", timestamp, file: data };
        case "T":
          return { type: "interrupted", timestamp, file: data };
        case "D":
          return { type: "dropped", timestamp, file: data };
        case "Z":
          return { type: "failed", timestamp, reason: data };
        case "P":
          return { type: "params", timestamp, params: data.split(",") };
        case "G":
          return { type: "variables", timestamp, data };
        case "I":
          return { type: "inform", timestamp, message: data };
      }
    }
  }
  return { type: "unknown", line: text.slice(from, to) };
}

/**
 * Writes an event as Asterisk does, with its newline: the other direction of {@linkcode parseEvent}, for hosts and
 * tests.
 *
 * @throws {IvrError} `invalid` for what would not be read as it was written: a CR, LF or NUL, an empty element, a comma in
 * one of the `params`, a timestamp that is no integer, an `unknown` line that means something.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { formatEvent } from "@externalivr/protocol";
 *
 * assert.deepEqual(formatEvent({ type: "finished", timestamp: 1, file: "beep" }), "F,         1,beep\n");
 * ```
 */
export function formatEvent(event: IvrEvent): string {
  const timestamp = String((event as { timestamp?: number }).timestamp).padStart(10);
  return format(EVENTS[event.type], event, { timestamp }, parseEvent);
}

/** An event or command by the names of its fields. */
type Fields = { type: string; [field: string]: unknown };

/** How characters become bytes: `latin1` carries every byte as the character of its number, both ways. */
export type Encoding = "utf-8" | "latin1";

/** Characters that no line can carry: those that end it, halves of surrogate pairs, and what Latin-1 does not have. */
const unfit = (encoding: Encoding): RegExp =>
  encoding === "latin1" ? /[\0\r\n]|[^\0-\xff]/gu : /[\0\r\n\p{Surrogate}]/gu;

/**
 * Writes a line in its form, as `EVENTS` has it, and refuses one that would not be read as it was meant. Fields that are
 * not written as they are have their text in `texts`.
 */
function format(
  form: string | undefined,
  meant: Fields,
  texts: Record<string, unknown>,
  parse: (line: string) => Fields,
  encoding: Encoding = "utf-8",
): string {
  if (!form) refuse("type", meant.type, "there is no such thing");
  const fields = form.split(",");
  const parts = fields.map((field) => field.length > 1 ? texts[field] ?? meant[field] : field); // a tag is itself
  while (parts.length > 1 && parts.at(-1) === undefined) parts.pop();
  const line = parts.join();
  if (line.search(unfit(encoding)) >= 0) {
    refuse(form, JSON.stringify(line), `CR, LF, NUL and what ${encoding} lacks have no place in a line`);
  }
  const read = parse(line);
  const differs = (field: string) => field.length > 1 && JSON.stringify(meant[field]) !== JSON.stringify(read[field]);
  if (["type", ...fields].some(differs)) {
    refuse(form, JSON.stringify(meant), `it would be read as ${JSON.stringify(read).slice(0, 999)}`);
  }
  return line + "\n";
}

function refuse(what: string, value: unknown, rule: string, code: IvrErrorCode = "invalid"): never {
  throw new IvrError(code, `Cannot use ${what} ${String(value).slice(0, 80)}: ${rule}`);
}

// ---------------------------------------------------------------------------------------------------------
// 2. Commands: application to Asterisk, `letter,payload`
// ---------------------------------------------------------------------------------------------------------

/**
 * What an application asks of Asterisk. File names are without suffix, as everywhere in the dialplan.
 *
 * - `play` (`S`): clear the playlist and play this file; `queue` (`A`): play it after what waits.
 * - `interrupt` (`I`): stop and clear the playlist. `answer` (`T`): answer the channel.
 * - `dtmf` (`D`): press keys toward the caller, `interval` milliseconds apart (absent or 0: Asterisk's 250), each
 *   held for `duration` milliseconds (absent or 0: Asterisk's default).
 * - `autoclear` (`O`): whether a key interrupts and clears the playlist by itself.
 * - `set` (`V`), `get` (`G`): channel variables. `params` (`P`): the arguments of the dialplan's call.
 * - `log` (`L`): a line for Asterisk's log. `hangup` (`H`), `exit` (`E`): log the message and end the call, or go on
 *   in the dialplan.
 * - `unknown`: every other line. Asterisk ignores it without a word.
 */
export type IvrCommand =
  | { type: "play"; file: string }
  | { type: "queue"; file: string }
  | { type: "interrupt" }
  | { type: "answer" }
  | { type: "dtmf"; digits: string; interval?: number; duration?: number }
  | { type: "autoclear"; on: boolean }
  | { type: "set"; variables: Record<string, string> }
  | { type: "get"; names: string[] }
  | { type: "params" }
  | { type: "log"; message: string }
  | { type: "hangup"; message?: string }
  | { type: "exit"; message?: string }
  | { type: "unknown"; line: string };

/** Asterisk cuts a longer line and runs the rest of it as the next command. */
const MAX_COMMAND_BYTES = 1022;

/** The same of each command. Asterisk ignores one without a payload: where there is none, `type` fills its place. */
const COMMANDS: Record<IvrCommand["type"], string> = {
  play: "S,file",
  queue: "A,file",
  interrupt: "I,type",
  answer: "T,type",
  dtmf: "D,digits,interval,duration",
  autoclear: "O,on",
  set: "V,variables",
  get: "G,names",
  params: "P,type",
  log: "L,message",
  hangup: "H,message",
  exit: "E,message",
  unknown: "line",
};

/** Refused although it reads back as it was: an empty name, an equals sign in a name, a blank at the end of a value. */
const FLAWS: { [type: string]: RegExp } = { set: /,=|[\0- ],/, get: /=|,[,\n]/ };

/**
 * Reads one command as Asterisk does: a NUL ends it, blanks at its end are trimmed, only its first character and what
 * stands behind the second count, and fewer than three characters mean nothing. Never throws: what Asterisk would
 * ignore is `unknown`. The deprecated `X` reads as `exit`.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { parseCommand } from "@externalivr/protocol";
 *
 * assert.deepEqual(parseCommand("V,A=1,B=x=y\n"), { type: "set", variables: { A: "1", B: "x=y" } });
 * assert.deepEqual(parseCommand("E,"), { type: "unknown", line: "E," });
 * ```
 */
export function parseCommand(line: string): IvrCommand {
  let end = line.indexOf("\0");
  if (end < 0) end = line.length;
  while (line.charCodeAt(end - 1) <= 32) end--;
  const payload = line.slice(2, end);
  switch (payload && line[0]) {
    case "S":
      return { type: "play", file: payload };
    case "A":
      return { type: "queue", file: payload };
    case "I":
      return { type: "interrupt" };
    case "T":
      return { type: "answer" };
    case "D": {
      const [, digits, interval, duration] = /^([0-9A-D*#]+)(?:,(\d*)(?:,(\d*))?)?$/.exec(payload) ?? [];
      if (!digits) break;
      const command: IvrCommand = { type: "dtmf", digits };
      if (interval) command.interval = Number(interval);
      if (duration) command.duration = Number(duration);
      return command;
    }
    case "O":
      if (!/^(no)?autoclear$/i.test(payload)) break;
      return { type: "autoclear", on: payload.length === "autoclear".length };
    case "V": {
      const pairs = payload.split(",").map((pair) => /([^=]*)=?(.*)/s.exec(pair)!.slice(1));
      return { type: "set", variables: Object.fromEntries(pairs) };
    }
    case "G":
      return { type: "get", names: payload.split(",") };
    case "P":
      return { type: "params" };
    case "L":
      return { type: "log", message: payload };
    case "H":
      return { type: "hangup", message: payload };
    case "E":
    case "X":
      return { type: "exit", message: payload };
  }
  return { type: "unknown", line: chomp(line) };
}

/**
 * Writes a command with its newline. The payload is never empty, since Asterisk ignores a command without one.
 *
 * @throws {IvrError} `invalid` for what Asterisk would not read as it was written: an empty element, a CR, LF or NUL, a
 * blank at an end, a comma in a variable's name or value, an equals sign in a name, a key that does not exist, a character
 * beyond U+00FF with `latin1`; `too-long` over 1022 bytes.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { formatCommand, IvrError } from "@externalivr/protocol";
 *
 * assert.deepEqual(formatCommand({ type: "dtmf", digits: "123#", duration: 80 }), "D,123#,,80\n");
 * assert.throws(() => formatCommand({ type: "set", variables: { LIST: "a,b" } }), IvrError);
 * ```
 */
export function formatCommand(command: IvrCommand, encoding: Encoding = "utf-8"): string {
  const form = COMMANDS[command.type];
  let texts = {};
  switch (command.type) {
    case "autoclear":
      texts = { on: command.on ? "autoclear" : "noautoclear" };
      break;
    case "set":
      texts = { variables: Object.entries(command.variables).map((pair) => pair.join("=")) };
      break;
    case "hangup":
    case "exit":
      command = { ...command, message: command.message ?? command.type };
  }
  const line = format(form, command, texts, parseCommand, encoding);
  if (FLAWS[command.type]?.test(line)) {
    refuse(form, JSON.stringify(line), "a name is empty or holds an equals sign, or a value ends in a blank");
  }
  const bytes = encode(line, encoding).length - 1;
  if (bytes > MAX_COMMAND_BYTES) {
    refuse(form, JSON.stringify(line), `${bytes} bytes exceed ${MAX_COMMAND_BYTES}`, "too-long");
  }
  return line;
}

/** Bytes as a `TextEncoder` makes them: never of shared memory, which streams of some types refuse. */
export type Bytes = ReturnType<InstanceType<typeof TextEncoder>["encode"]>;

function encode(text: string, encoding: Encoding): Bytes {
  return encoding === "latin1" ? Uint8Array.from(text, (char) => char.charCodeAt(0)) : new TextEncoder().encode(text);
}

/**
 * Reads the data of a `variables` event, given the names that were asked, in their order: so commas and equals signs in
 * values come back whole, as long as no value looks like the next name. A name whose value Asterisk cut away is absent.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { parseVariables } from "@externalivr/protocol";
 *
 * assert.deepEqual(parseVariables("A=1,2=3,B=", ["A", "B"]), { A: "1,2=3", B: "" });
 * ```
 */
export function parseVariables(data: string, names: string[]): Record<string, string> {
  const values: [string, string][] = [];
  for (const [i, name] of names.entries()) {
    if (!data.startsWith(name + "=")) break;
    data = data.slice(name.length + 1);
    let end = i + 1 < names.length ? data.indexOf(`,${names[i + 1]}=`) : -1;
    if (end < 0) end = data.length;
    values.push([name, data.slice(0, end)]);
    data = data.slice(end + 1);
  }
  return Object.fromEntries(values); // which takes "__proto__" as a name like any other
}

// ---------------------------------------------------------------------------------------------------------
// 3. Lines: bytes to lines
// ---------------------------------------------------------------------------------------------------------

/** Where bytes come from: a `ReadableStream<Uint8Array>` of any runtime, or as much of one as is used. */
export interface Source {
  /** Takes the stream for this reader alone. */
  getReader(): {
    /** The next chunk, or `done`. */
    read(): Promise<{ done: boolean; value?: Uint8Array | undefined }>;
    /** Gives the stream up. */
    cancel(reason?: unknown): Promise<void>;
  };
}

/** Where bytes go: a `WritableStream<Uint8Array>` of any runtime, or as much of one as is used. */
export interface Sink {
  /** Takes the stream for this writer alone. */
  getWriter(): {
    /** Takes a chunk; settles when it went out. */
    write(chunk: Bytes): Promise<void>;
    /** Ends the stream after what was written. */
    close(): Promise<void>;
    /** Ends the stream at once. */
    abort(reason?: unknown): Promise<void>;
  };
}

/** How bytes become lines. */
export interface LinesOptions {
  /** `"utf-8"`, where malformed bytes become U+FFFD, or `"latin1"`, which loses none. The default is `"utf-8"`. */
  encoding?: Encoding;
  /** The longest line, in characters without its line break: a bound on memory. The default is 64 KiB. */
  maxLine?: number;
}

/**
 * The lines of a stream of bytes, without their `\n` or `\r\n`, wherever the chunks were cut. A last line without a
 * newline is a line too. Leaving the loop cancels the stream.
 *
 * A line is a slice of its chunk's text: keep a copy of what is to be kept long.
 *
 * @throws {IvrError} `too-long` when a line exceeds `maxLine`, after the lines before it.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { lines } from "@externalivr/protocol";
 *
 * const bytes = new Blob(["1,1795372496\nH,17953", "72497"]).stream();
 * assert.deepEqual(await Array.fromAsync(lines(bytes)), ["1,1795372496", "H,1795372497"]);
 * ```
 */
export async function* lines(readable: Source, options: LinesOptions = {}): AsyncGenerator<string, void, void> {
  const cutter = new Cutter((text, from, to) => text.slice(from, to), options);
  const reader = readable.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      cutter.add(done ? undefined : value);
      for (let line; (line = cutter.take()) !== undefined;) yield line;
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(ignore);
  }
}

/** Cuts chunks into lines, and reads each line where it stands in the text of its chunk. */
class Cutter<Line> {
  #read: (text: string, from: number, to: number) => Line;
  #encoding: Encoding;
  #maxLine: number;
  #utf8?: InstanceType<typeof TextDecoder>; // made with the first bytes: a quiet call costs none
  #text = ""; // of the chunk that is being cut
  #from = 0; // where its next line begins
  #rest = ""; // a line whose end is in a later chunk

  constructor(read: (text: string, from: number, to: number) => Line, options: LinesOptions) {
    this.#read = read;
    this.#encoding = options.encoding ?? "utf-8";
    this.#maxLine = options.maxLine ?? 65536;
  }

  /** Takes the next chunk, once all lines of the last one are taken; none at the end, which also ends the last line. */
  add(chunk?: Uint8Array): void {
    this.#text = this.#decode(chunk);
    this.#from = 0;
    if (!chunk && (this.#rest || this.#text)) this.#text += "\n";
  }

  /** The next line that is complete. */
  take(): Line | undefined {
    let text = this.#text;
    let from = this.#from;
    if (from === text.length) return undefined; // most chunks end with a line
    let to = text.indexOf("\n", from);
    if (to < 0) {
      this.#rest += text.slice(from); // not searched again: a long line in small chunks would take for ever
      this.#text = "";
      if (this.#rest.length > this.#maxLine + 1) this.#fail(this.#rest); // one more may be a CR
      return undefined;
    }
    this.#from = to + 1;
    if (this.#rest) {
      text = this.#rest + text.slice(from, to);
      from = 0;
      to = text.length;
      this.#rest = "";
    }
    if (text[to - 1] === "\r") to--;
    if (to - from > this.#maxLine) this.#fail(text.slice(from, to));
    return this.#read(text, from, to);
  }

  #decode(chunk?: Uint8Array): string {
    if (this.#encoding === "latin1") {
      // The decoder of this name is Windows-1252 everywhere: the bytes 0x80 to 0x9F would not come back
      return Array.from(chunk ?? [], (byte) => String.fromCharCode(byte)).join("");
    }
    this.#utf8 ??= new TextDecoder("utf-8", { fatal: false, ignoreBOM: true });
    return this.#utf8.decode(chunk, { stream: !!chunk });
  }

  #fail(line: string): never {
    throw new IvrError("too-long", `Cannot read "${line.slice(0, 80)}…": longer than ${this.#maxLine} characters`);
  }
}

const ignore = (): void => {};

// ---------------------------------------------------------------------------------------------------------
// 4. Session: a live call
// ---------------------------------------------------------------------------------------------------------

/** Limits and encoding of a {@linkcode Session}. */
export interface SessionOptions extends LinesOptions {
  /** How many events may wait for the iterator before the session fails with `overflow`. The default is 10,000. */
  maxQueue?: number;
}

/**
 * What became of a prompt.
 *
 * - `finished`: it played to its end. `interrupted`: it was stopped while it played. `dropped`: it was removed before
 *   its turn.
 * - `missing`: there is no such file. `refused`: the channel is not answered, or hung up.
 * - `skipped`: the file exists but Asterisk could not open it. It says so to nobody: only something behind it that
 *   moved on tells.
 * - `ended`: the call ended first, or, with the dialplan's option `i`, the caller hung up.
 */
export type Outcome = "finished" | "interrupted" | "dropped" | "missing" | "refused" | "skipped" | "ended";

/** How a call ended: who ended it, and for `error` with what. `disconnect` is the end of the stream without a word. */
export interface Ending {
  /** Who ended the call. */
  by: "caller" | "hangup" | "exit" | "disconnect" | "error";
  /** What failed: an {@linkcode IvrError}, or the error of a stream. */
  error?: unknown;
}

/** What {@linkcode Session.gather} plays, collects and waits for. */
export interface GatherOptions {
  /** Files to play first, queued behind what plays already. */
  prompt?: string | string[];
  /** Done with so many digits. The default is no limit. */
  maxDigits?: number;
  /** Each of these keys ends the input and is no part of it. The default is `"#"`. */
  terminators?: string;
  /** Milliseconds to the first key, from the end of the prompts. The default is 5000; `Infinity` waits for ever. */
  timeout?: number;
  /** Milliseconds to each further key. The default is `timeout`. */
  interDigitTimeout?: number;
  /** Whether the first key interrupts the prompts, and a key that waits already skips them. The default is `true`. */
  bargeIn?: boolean;
  /** Whether keys pressed before are thrown away rather than taken (type-ahead). The default is `false`. */
  flush?: boolean;
  /** Ends the gathering early. */
  signal?: AbortSignal;
}

/** What was gathered, and why it ended there. */
export interface Gathered {
  /** The keys, without the terminator. */
  digits: string;
  /** Why the gathering ended. */
  reason: "maxDigits" | "terminator" | "timeout" | "hangup" | "aborted";
  /** The key that ended it, if one did. */
  terminator?: Digit;
}

/** What the promise of a command is for: that it is done, the reply to it, or what became of its file. */
type Wanted = "done" | "reply" | "outcome";

/** A command that awaits its answer, a file that awaits its end, or first the one and then the other. */
interface Asked {
  type: IvrCommand["type"];
  /** What `S` or `A` plays. */
  file: string | undefined;
  wanted: Wanted;
  /** The variable whose `G` answers, or `PARAMS`. */
  name: string;
  /** Whether the iterator is not to see the answer. */
  hidden: boolean;
  resolve(result: unknown): void;
  reject(error: IvrError): void;
}

/** A call of an iterator's `next` that waits. */
interface Waiter {
  /** Whether the loop was left. */
  left(): boolean;
  resolve(result: IteratorResult<IvrEvent, undefined>): void;
  reject(error: unknown): void;
}

/** What the answer to `P` goes by: no variable has this name. */
const PARAMS = "=";

/** What Asterisk owes: the answers to commands, and the ends of files. */
class Pending {
  /** The commands that await their answer, in order. */
  asked: Asked[] = [];
  /** The files that have not ended, in order, and each `I` that is not answered. */
  playlist: Asked[] = [];
  /** How many commands had no answer of their own. */
  #count = 0;

  /** Adds a command, and gives the question to send behind it: none when it has an answer of its own. */
  add(command: IvrCommand, wanted: Wanted, resolve: Asked["resolve"], reject: Asked["reject"]): string {
    const { type } = command;
    const file = type === "play" || type === "queue" ? command.file : undefined;
    const own = type === "get" ? command.names[0] : type === "params" ? PARAMS : undefined;
    const name = own ?? `EIVR_ACK_${++this.#count}`;
    const asked = { type, file, wanted, name, hidden: !own || wanted === "reply", resolve, reject };
    this.asked.push(asked);
    if (file || type === "interrupt") this.playlist.push(asked);
    return own ? "" : `G,${name}\n`;
  }

  /** Settles what an event tells of, and gives the command that it answers, if it is an answer. */
  receive(event: IvrEvent): Asked | undefined {
    switch (event.type) {
      case "params":
        return this.#answered(PARAMS, event.params);
      case "variables":
        return this.#answered(event.data.slice(0, event.data.indexOf("=")), event.data);
      case "failed":
        this.#refused(event.reason);
        break;
      case "finished":
      case "interrupted":
      case "dropped":
        this.#moved(event.type, event.file);
    }
    return undefined;
  }

  #answered(name: string, answer: string | string[]): Asked | undefined {
    const at = this.asked.findIndex((asked) => asked.name === name);
    if (at < 0) return undefined;
    const [asked] = this.asked.splice(at, 1) as [Asked];
    // `S` and `I` clear: what is still before them was skipped, and the `I` itself is over
    if (asked.type !== "queue") this.settle("skipped", this.playlist.indexOf(asked) + (asked.file ? 0 : 1));
    if (asked.wanted !== "outcome") asked.resolve(asked.wanted === "reply" ? answer : undefined);
    return asked;
  }

  /** A `Z` is the command's whose acknowledgement comes next. */
  #refused(reason?: string): void {
    const [asked] = this.asked;
    if (!asked) return;
    this.playlist = this.playlist.filter((prompt) => prompt !== asked);
    const why = reason ?? "the channel is not answered, or hung up";
    if (asked.wanted === "outcome") asked.resolve(reason === undefined ? "refused" : "missing");
    else asked.reject(new IvrError("refused", `Asterisk refused: ${why}`));
  }

  /** A file left the playlist. What should have left before it, and did not say so, was skipped. */
  #moved(outcome: Outcome, file?: string): void {
    const at = this.playlist.findIndex((prompt) => file === undefined || prompt.file === file);
    if (at < 0) return;
    this.settle("skipped", at);
    this.settle(outcome, 1);
  }

  /** Tells what became of the first files of the playlist. */
  settle(outcome: Outcome, count = Infinity): void {
    for (const prompt of this.playlist.splice(0, count)) {
      if (prompt.wanted === "outcome") prompt.resolve(outcome);
    }
  }

  /** Nothing comes any more. */
  end(cause?: unknown): void {
    const error = new IvrError("ended", "The call has ended", { cause });
    for (const asked of this.asked.splice(0)) if (asked.wanted !== "outcome") asked.reject(error);
    this.settle("ended");
  }
}

/** What waits, and what waits behind it. */
interface Link<T> {
  item: T;
  next: Link<T> | undefined;
}

/** What waits, the oldest first. Adding costs the same however long the queue is, and so does taking the oldest. */
class Queue<T> {
  size = 0;
  #oldest?: Link<T> | undefined;
  #newest?: Link<T> | undefined;

  push(item: T): void {
    const link = { item, next: undefined };
    if (this.#newest) this.#newest.next = link;
    else this.#oldest = link;
    this.#newest = link;
    this.size++;
  }

  /** Takes out the oldest, or the oldest that is wanted. */
  take(wanted?: (item: T) => boolean): T | undefined {
    let before: Link<T> | undefined;
    let link = this.#oldest;
    for (; link && wanted && !wanted(link.item); link = link.next) before = link;
    if (!link) return undefined;
    if (before) before.next = link.next;
    else this.#oldest = link.next;
    if (!link.next) this.#newest = before;
    link.next = undefined; // or an old one that is garbage would keep the young ones behind it
    this.size--;
    return link.item;
  }
}

/** How long Asterisk's last words, or ours, may take: milliseconds. */
const GRACE = 1000;

const callerGone = (): IvrError => new IvrError("aborted", "The caller is gone");

type Timer = ReturnType<typeof setTimeout>;

/** A timer that keeps no process alive. */
function later(run: () => void, ms: number): Timer {
  const timer = setTimeout(run, ms);
  (timer as { unref?(): void }).unref?.();
  return timer;
}

function stop(timer?: Timer): void {
  if (timer !== undefined) clearTimeout(timer); // Workers' types take no undefined
}

/** Runs, and keeps a rejection that nobody looks at from being an unhandled one. */
function quiet<T>(run: () => Promise<T>): Promise<T> {
  const promise = run();
  promise.catch(ignore);
  return promise;
}

/**
 * A live call. It reads from the constructor on, whatever the user's code does: Asterisk writes from the thread that
 * carries the audio, so a reader that stops freezes the call.
 *
 * Two styles, alone or together: `for await (const event of session)` gives every event that nothing else asked for,
 * once and in order; and each command is a promise. Keys go to the {@linkcode Session.gather} under way, and wait for
 * the next one or for the iterator otherwise. (What became of each prompt waits for the iterator as well: a call that plays
 * more than {@linkcode SessionOptions.maxQueue} prompts and never iterates overflows.)
 *
 * A command's promise resolves when Asterisk has carried it out and rejects with an {@linkcode IvrError}: `invalid` or
 * `too-long` before anything is sent, `refused` when Asterisk answers `Z`, `ended` when the call ends first. A promise
 * that nobody awaits is never an unhandled rejection.
 *
 * How it knows, and why nothing stalls: most commands have no answer, but Asterisk carries them out in order, and
 * answers a `G` with the name that was asked. So a `G` of a name that nobody sets goes out behind each command, and its
 * answer acknowledges it; a `Z` before that answer is the command's. Since Asterisk 15 lines that arrive together wait
 * for further bytes, so while something is awaited an empty line follows after a millisecond, and again, ever more
 * slowly.
 *
 * @example Events
 * ```ts
 * import { Session, type Sink, type Source } from "@externalivr/protocol";
 *
 * async function echoKeys(streams: { readable: Source; writable: Sink }) {
 *   const ivr = new Session(streams);
 *   for await (const event of ivr) {
 *     if (event.type === "dtmf") ivr.play(`digits/${event.digit}`);
 *   }
 * }
 * ```
 */
export class Session {
  #reader: ReturnType<Source["getReader"]>;
  #writer: ReturnType<Sink["getWriter"]>;
  #encoding: Encoding;
  #maxQueue: number;

  // Reading: the events that wait for the iterator or a gather, or the iterators that wait for an event
  #events = new Queue<IvrEvent>();
  #drained?: () => void; // lets reading go on, when it waits for the events to be taken
  #collect: (() => void) | undefined; // the gather under way

  // Writing: what goes out at the end of this turn
  #out = "";

  // The next wake-up, and later the end of our patience
  #timer?: Timer;

  // Ending
  #leaving?: "hangup" | "exit"; // what we asked for
  #said?: Ending["by"]; // who it was, by Asterisk's last words
  #broken?: unknown; // why nothing can be written any more
  #gone = false; // the caller; with option `i` the call goes on
  #ending?: Ending; // set once it is over
  #released?: Promise<void>; // when both streams are closed

  // Made when they are asked for: a quiet call costs little more than its streams
  #waiters?: Queue<Waiter>;
  #pending?: Pending;
  #abort?: AbortController;
  #closed?: Promise<Ending>;
  #resolveClosed?: (ending: Ending) => void;

  /**
   * Takes both streams and starts to read.
   *
   * @throws {TypeError} when one of the streams is locked already.
   */
  constructor(streams: { readable: Source; writable: Sink }, options: SessionOptions = {}) {
    this.#encoding = options.encoding ?? "utf-8";
    this.#maxQueue = options.maxQueue ?? 10_000;
    this.#reader = streams.readable.getReader();
    this.#writer = streams.writable.getWriter();
    this.#read(new Cutter(eventIn, options));
  }

  /** Aborted when the caller is gone: on `H`, on `I,…,HANGUP`, at the end of the stream. Hand it to `fetch`. */
  get signal(): AbortSignal {
    this.#abort ??= new AbortController();
    if (this.#gone) this.#abort.abort(callerGone());
    return this.#abort.signal;
  }

  /** How the call ended, once it has. Never rejects. */
  get closed(): Promise<Ending> {
    return this.#closed ??= new Promise((resolve) => {
      this.#resolveClosed = resolve;
      if (this.#ending) resolve(this.#ending);
    });
  }

  /**
   * Sends any command, as the methods below do. A `get` or `params` sent like this has its reply in the iterator; `play`
   * and `queue` reject when the file is missing.
   */
  send(command: IvrCommand): Promise<void> {
    return this.#send(command);
  }

  /** Clears the playlist, plays the file, and resolves with what became of it. */
  play(file: string): Promise<Outcome> {
    return this.#send({ type: "play", file }, "outcome");
  }

  /** Plays the file after what waits in the playlist, and resolves with what became of it. */
  queue(file: string): Promise<Outcome> {
    return this.#send({ type: "queue", file }, "outcome");
  }

  /** Stops and clears the playlist (Asterisk 11). */
  interrupt(): Promise<void> {
    return this.send({ type: "interrupt" });
  }

  /** Answers the channel, for the dialplan's option `n`. */
  answer(): Promise<void> {
    return this.send({ type: "answer" });
  }

  /** Whether a key interrupts and clears the playlist by itself. */
  autoclear(on: boolean): Promise<void> {
    return this.send({ type: "autoclear", on });
  }

  /** Sets channel variables, or functions like `CALLERID(name)`, for the dialplan to read. */
  set(variables: Record<string, string>): Promise<void> {
    return this.send({ type: "set", variables });
  }

  /** Presses keys toward the caller. Asterisk does nothing else meanwhile. */
  sendDtmf(digits: string, options: { interval?: number; duration?: number } = {}): Promise<void> {
    return this.send({ type: "dtmf", digits, ...options });
  }

  /** Writes any text to Asterisk's log: each of its lines, cut where the wire ends, control characters as blanks. */
  log(text: string): Promise<void> {
    return quiet(async () => {
      const pieces: string[] = [];
      const room = new Uint8Array(MAX_COMMAND_BYTES - "L,".length);
      for (const line of text.split(/[\n\r]/)) {
        let rest = line.replace(/\p{Cc}/gu, " ").replace(unfit(this.#encoding), "?");
        while (rest) {
          const { read } = new TextEncoder().encodeInto(rest, room); // whole characters, as many as fit
          pieces.push(rest.slice(0, read).trimEnd());
          rest = rest.slice(read);
        }
      }
      await Promise.all(pieces.filter(Boolean).map((message) => this.#send({ type: "log", message })));
    });
  }

  /**
   * Reads channel variables, or globals, one `G` a name. An unset one is empty; so are functions like `CALLERID(num)` and
   * built-ins like `EXTEN`, which the dialplan has to copy into a variable first.
   *
   * Rejects with `truncated` when Asterisk may have cut a value: at 2047 bytes of name, equals sign and value, or at
   * 2046, since a comma at the cut is lost as well.
   */
  get(...names: string[]): Promise<Record<string, string>> {
    return quiet(async () => {
      const questions = names.map((name): IvrCommand => ({ type: "get", names: [name] }));
      for (const question of questions) formatCommand(question, this.#encoding); // all are good before the first goes out
      const answers = await Promise.all(questions.map((question) => this.#send<string>(question, "reply")));
      const values = Object.fromEntries(names.map((name, i) => [name, answers[i]!.slice(name.length + 1)]));
      const cut = names.find((_, i) => encode(answers[i]!, this.#encoding).length >= 2046);
      if (cut === undefined) return values;
      const error = new IvrError("truncated", `Cannot get "${cut}" whole: Asterisk cuts at 2047 bytes`);
      error.partial = values;
      throw error;
    });
  }

  /** The dialplan's call: the command itself (`ivr://host` or the program's path) and its arguments. */
  params(): Promise<string[]> {
    return this.#send({ type: "params" }, "reply");
  }

  /**
   * Plays prompts and collects keys until `maxDigits`, a terminator, a pause, or the end of the call, and resolves with
   * what was collected so far in every case. A key past the end waits for whoever comes next.
   *
   * The first key's time runs from the end of the prompts. A prompt that Asterisk silently skips (see
   * {@linkcode Outcome}) has no end before the next thing in the playlist moves on.
   *
   * Rejects with `invalid` for options out of range, and when another `gather` is under way.
   *
   * @example An account number, in up to three tries
   * ```ts
   * import type { Session } from "@externalivr/protocol";
   *
   * async function account(ivr: Session): Promise<string | undefined> {
   *   for (let tries = 0; tries < 3; tries++) {
   *     const { digits, reason } = await ivr.gather({ prompt: ["please-enter-your", "account"], maxDigits: 8 });
   *     if (digits || reason === "hangup") return digits;
   *   }
   * }
   * ```
   */
  gather(options: GatherOptions = {}): Promise<Gathered> {
    return quiet(() => new Promise((resolve) => this.#gather(options, resolve)));
  }

  /** Ends the call with a message for the log. Resolves when the stream has ended, whoever ended it. */
  hangup(message = "hangup"): Promise<void> {
    return this.send({ type: "hangup", message });
  }

  /** Goes on in the dialplan, with a message for the log. Resolves when the stream has ended, whoever ended it. */
  exit(message = "exit"): Promise<void> {
    return this.send({ type: "exit", message });
  }

  /** Closes the streams without a word, whereupon Asterisk hangs up. What was sent before still goes out. */
  close(): Promise<void> {
    this.#finish();
    return this.#released!;
  }

  /** The same as {@linkcode Session.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /**
   * Every event that nothing else asked for, in order, each once: two loops share them. Leaving the loop leaves the
   * session as it is. The loop ends with the call, and throws what it failed with, if it did.
   */
  [Symbol.asyncIterator](): AsyncIterableIterator<IvrEvent, undefined> {
    let left = false;
    const iterator: AsyncIterableIterator<IvrEvent, undefined> = {
      next: () => {
        const value = left ? undefined : this.#next();
        if (value) return Promise.resolve({ value, done: false });
        const promise: Promise<IteratorResult<IvrEvent, undefined>> = new Promise((resolve, reject) => {
          const fail = (error: unknown) => (promise.catch(ignore), reject(error)); // nobody may await it any more
          (this.#waiters ??= new Queue()).push({ left: () => left, resolve, reject: fail });
        });
        if (left || this.#ending) this.#dismiss();
        return promise;
      },
      return: () => {
        left = true;
        this.#dismiss();
        return Promise.resolve({ value: undefined, done: true });
      },
      [Symbol.asyncIterator]: () => iterator,
    };
    return iterator;
  }

  async #read(cutter: Cutter<IvrEvent>): Promise<void> {
    try {
      for (;;) {
        const { done, value } = await this.#reader.read();
        cutter.add(done ? undefined : value);
        for (let event; !this.#ending && (event = cutter.take());) {
          // What stands behind the last newline may be cut: it may end the call, but it answers nothing
          if (done && event.type !== "hangup" && event.type !== "exit") this.#show(event);
          else this.#receive(event);
          if (this.#events.size > this.#maxQueue) await this.#room();
        }
        if (done) return this.#finish();
      }
    } catch (error) {
      this.#finish(error ?? new Error("The stream of events failed"));
    }
  }

  /** Waits for the events to be taken, but no longer than a turn of the event loop: then nobody takes them. */
  async #room(): Promise<void> {
    let timer: Timer | undefined;
    await new Promise<void>((resolve) => {
      this.#drained = resolve;
      timer = setTimeout(() => timer = setTimeout(resolve)); // behind every timer of this turn
    });
    stop(timer);
    if (this.#events.size > this.#maxQueue) {
      throw new IvrError("overflow", `Cannot keep more than ${this.#maxQueue} events: nobody takes them`);
    }
  }

  /** Gives an event to who asked for it; everything else goes to the iterator. */
  #receive(event: IvrEvent): void {
    if (event.type === "dtmf" && this.#collect) {
      this.#events.push(event);
      return this.#collect();
    }
    const answered = this.#pending?.receive(event);
    if (answered) this.#wake();
    if (answered?.hidden) return;
    if (!this.#said && (event.type === "hangup" || event.type === "exit")) {
      this.#said = event.type === "hangup" && this.#leaving !== "hangup" ? "caller" : event.type;
      this.#expectEnd();
    }
    this.#show(event);
    if (event.type === "hangup" || event.type === "inform" && event.message === "HANGUP") this.#hungUp();
  }

  /** Gives an event to the iterator that waits for it, or lets it wait. */
  #show(event: IvrEvent): void {
    if (this.#waiters?.size && !this.#events.size) {
      return this.#waiters.take()!.resolve({ value: event, done: false });
    }
    this.#events.push(event);
    this.#deliver();
  }

  #takeKey(): Digit | undefined {
    return (this.#take((event) => event.type === "dtmf") as IvrEvent & { type: "dtmf" } | undefined)?.digit;
  }

  /** The oldest event that the iterator may have: not a key while a gather is under way. */
  #next(): IvrEvent | undefined {
    return this.#take(this.#collect && ((event) => event.type !== "dtmf"));
  }

  #take(wanted?: (event: IvrEvent) => boolean): IvrEvent | undefined {
    const event = this.#events.take(wanted);
    if (!this.#events.size) this.#drained?.();
    return event;
  }

  /** Gives events that wait to iterators that wait: both do when a gather held the keys back. */
  #deliver(): void {
    for (let value; this.#waiters?.size && (value = this.#next());) {
      this.#waiters.take()!.resolve({ value, done: false });
    }
  }

  /** Ends the waiting of loops that were left, or of all loops when the call is over. */
  #dismiss(): void {
    const waiters = this.#waiters;
    this.#waiters = undefined;
    for (let waiter; (waiter = waiters?.take());) {
      if (this.#ending?.by === "error" && !waiter.left()) waiter.reject(this.#ending.error);
      else if (this.#ending || waiter.left()) waiter.resolve({ value: undefined, done: true });
      else (this.#waiters ??= new Queue()).push(waiter);
    }
  }

  #gather(options: GatherOptions, resolve: (gathered: Gathered) => void): void {
    const { prompt = [], maxDigits = Infinity, terminators = "#", timeout = 5000, bargeIn = true, signal } = options;
    const { interDigitTimeout = timeout } = options;
    if (maxDigits !== Infinity && !(Number.isInteger(maxDigits) && maxDigits > 0)) {
      refuse("maxDigits", maxDigits, "it has to be a whole number above zero");
    }
    for (const [field, ms] of Object.entries({ timeout, interDigitTimeout })) {
      if (typeof ms !== "number" || !(ms >= 0)) refuse(field, ms, "it has to be milliseconds");
    }
    for (const key of terminators) {
      if (!DIGITS.includes(key)) refuse("terminators", key, "no such key");
    }
    if (this.#collect) refuse("gather", "now", "another one is under way");
    const files = [prompt].flat(); // emptied when they are queued
    for (const file of files) formatCommand({ type: "queue", file }, this.#encoding); // all are good before one is sent

    let playing = 0; // how many of our prompts have not ended
    let digits = "";
    let late = false;
    let timer: Timer | undefined;
    const wait = (ms: number) => {
      stop(timer);
      if (ms < 2 ** 31) timer = later(() => (late = true, collect()), ms); // a longer one would go off at once
    };
    const ended = () => {
      if (!playing) return; // interrupted
      playing--;
      collect();
    };
    // Looks at all there is to know, whatever has changed
    const collect = () => {
      const over = this.#gone ? "hangup" : signal?.aborted ? "aborted" : late ? "timeout" : undefined;
      let reason: Gathered["reason"] | undefined;
      let terminator: Digit | undefined;
      const takes = over || bargeIn || !playing && !files.length;
      for (let key; takes && !reason && (key = this.#takeKey());) {
        if (terminators.includes(key)) {
          terminator = key;
          reason = "terminator";
        } else {
          digits += key;
          if (digits.length === maxDigits) reason = "maxDigits";
          else wait(interDigitTimeout);
        }
      }
      reason ??= over;
      if (playing && (digits || reason)) {
        playing = 0;
        if (!this.#gone) this.interrupt();
      }
      if (reason) {
        stop(timer);
        signal?.removeEventListener("abort", collect);
        this.#collect = undefined;
        resolve({ digits, reason, ...terminator && { terminator } });
        this.#deliver(); // the keys that are left
      } else if (!digits) {
        playing += files.length;
        for (const file of files.splice(0)) this.#ask({ type: "queue", file }, "outcome", ended, ignore);
        if (!playing && timer === undefined) wait(timeout);
      }
    };

    while (options.flush && this.#takeKey());
    if (signal?.aborted) return resolve({ digits, reason: "aborted" });
    signal?.addEventListener("abort", collect);
    this.#collect = collect;
    collect();
  }

  #send<Result = void>(command: IvrCommand, wanted: Wanted = "done"): Promise<Result> {
    return quiet(() =>
      new Promise<unknown>((resolve, reject) => this.#ask(command, wanted, resolve, reject))
    ) as Promise<Result>;
  }

  /** Sends a command, with a question behind it if it has no answer of its own. */
  #ask(command: IvrCommand, wanted: Wanted, resolve: Asked["resolve"], reject: Asked["reject"]): void {
    let lines = formatCommand(command, this.#encoding);
    if (command.type === "hangup" || command.type === "exit") {
      resolve(this.closed.then(ignore));
      if (this.#leaving || this.#ending) return;
      this.#leaving = command.type;
    } else {
      const pending = this.#pending ??= new Pending();
      lines += pending.add(command, wanted, resolve, reject);
      if (this.#ending) return pending.end();
    }
    this.#write(lines);
    this.#wake();
  }

  /** Writes what is sent in one turn in one go. */
  #write(text: string): void {
    this.#out += text;
    if (this.#out !== text) return; // goes out with what was there before
    Promise.resolve().then(() => {
      const bytes = encode(this.#out, this.#encoding);
      this.#out = "";
      return this.#writer.write(bytes);
    }).catch((error) => {
      if (this.#broken || this.#ending) return;
      this.#broken = error ?? new Error("The stream of commands failed");
      this.#expectEnd(); // Asterisk is gone, but its last words may still be on their way
    });
  }

  /** The stream of events is about to end: if it does not, we end it. */
  #expectEnd(): void {
    stop(this.#timer);
    this.#timer = later(() => this.#finish(), GRACE);
  }

  /** Wakes Asterisk while something is awaited: a millisecond after anything moved, then ever more slowly. */
  #wake(delay = 1): void {
    if (this.#broken || this.#said) return;
    stop(this.#timer);
    if (!this.#pending?.asked.length && !this.#leaving) return;
    this.#timer = later(() => {
      this.#write("\n");
      this.#wake(Math.min(delay * 2, 1000));
    }, delay);
  }

  /** The caller is gone, and nothing plays any more, even if the call is still ours. */
  #hungUp(): void {
    this.#pending?.settle("ended");
    this.#gone = true;
    this.#collect?.();
    this.#abort?.abort(callerGone());
  }

  #finish(error: unknown = this.#broken): void {
    if (this.#ending) return;
    // A reset after our own H or E is Asterisk closing with our wake-ups unread
    const failed = error instanceof IvrError ? "error" : this.#leaving ?? "error";
    const by = this.#said ?? (error === undefined ? "disconnect" : failed);
    this.#ending = by === "error" ? { by, error } : { by };
    stop(this.#timer);
    this.#pending?.end(error);
    this.#released = this.#release(this.#ending);
    this.#resolveClosed?.(this.#ending);
    this.#hungUp();
    this.#dismiss();
  }

  /** Closes both streams: what was sent goes out first, unless the session failed or the peer does not take it. */
  async #release({ by, error }: Ending): Promise<void> {
    const grace = new Promise<void>((resolve) => this.#timer = later(resolve, GRACE));
    const inTime = (closing: Promise<void>) => Promise.race([grace, closing.catch(ignore)]);
    if (by === "error") this.#writer.abort(error).catch(ignore);
    else {
      // A socket that ends by itself, as Node's do, is to do so first: Deno fails when both close it in one turn
      await new Promise<void>((resolve) => setTimeout(resolve));
      await inTime(this.#writer.close());
    }
    await inTime(this.#reader.cancel());
    stop(this.#timer);
  }
}
