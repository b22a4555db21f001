// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Telephone menus for Asterisk's dialplan application `ExternalIVR`, in one file without dependencies.
 *
 * Asterisk runs a program or connects to a TCP server for one call, sends it *events* as lines (keys pressed,
 * prompts finished, the caller gone) and carries out the *commands* that come back (play, queue, set a
 * variable, hang up). This module parses and formats both; {@linkcode Session} holds the conversation over any
 * pair of streams, {@linkcode Ivr} is a session with the words of a menu, and {@linkcode answer} takes a call
 * from its first event to its last.
 *
 * @example A menu
 * ```ts
 * import { answer, type Ivr } from "@externalivr/protocol";
 *
 * async function menu(ivr: Ivr) {
 *   const { digits } = await ivr.gather({ prompt: "vm-enter-num-to-call", maxDigits: 4 });
 *   if (digits) await ivr.set({ ACCOUNT: digits });
 *   await ivr.exit(); // the dialplan goes on
 * }
 *
 * async function serve(calls: Deno.TcpListener) { // ExternalIVR(ivr://host); any other pair of streams is a call as well
 *   for await (const call of calls) answer(call, menu).catch(console.error);
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
export type IvrErrorCode = "invalid" | "refused" | "ended" | "overflow" | "truncated";

/**
 * The one error of this module. `code` tells what went wrong:
 *
 * - `invalid`: a value that the wire cannot carry, or that means nothing; `field` names it. Nothing was sent.
 * - `refused`: Asterisk answered the command with `Z`; `reason` is what it said, if anything.
 * - `ended`: the call was over, or ended before the command was known to be carried out. Also the reason of
 *   {@linkcode Session.signal}.
 * - `overflow`: more came and waited than {@linkcode LinesOptions.maxBuffer}; or, noticed when the next bytes come, the
 *   characters of commands that are not written yet and fifty for each that is not answered exceed a million.
 * - `truncated`: Asterisk cut the reply to `get`; `partial` holds what came.
 */
export class IvrError extends Error {
  /** Always `"IvrError"`. */
  override name = "IvrError";
  /** What went wrong. */
  declare code: IvrErrorCode;
  /** With `invalid`: the field of the event or command, or the option. */
  declare field?: string | undefined;
  /** With `refused`: the file that does not exist, `ANSWER_FAILURE` or `GENERATOR_FAILURE`. */
  declare reason?: string | undefined;
  /** With `truncated`: the variables as they came, the last bytes missing. */
  declare partial?: Record<string, string>;

  /** Makes an error with a code, a message, and what else there is to know. */
  constructor(code: IvrErrorCode, message: string, more?: Partial<IvrError>) {
    super(message.replace(/\p{C}/gu, "?")); // nothing invisible, whoever it came from
    Object.assign(this, { code }, more);
  }
}

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
  return eventIn(line, 0, line.length - +line.endsWith("\n") - +line.endsWith("\r\n"));
}

/** Reads the line that stands between two places of a text, so that nobody has to cut it out first. */
function eventIn(text: string, from: number, to: number): IvrEvent {
  let at = from + 2;
  while (text[at] === " ") at++; // "%10d" pads with blanks on the left
  const minus = text[at] === "-";
  if (minus) at++;
  let timestamp = 0;
  const start = at;
  // No code behind the end is read: JavaScriptCore reads all codes more slowly from then on
  for (let digit; at < to && (digit = text.charCodeAt(at) - 48) >= 0 && digit <= 9; at++) {
    timestamp = timestamp * 10 + digit;
  }
  const dated = at > start && text[from + 1] === "," && timestamp < 2 ** 53; // from there on numbers have gaps
  if (minus) timestamp = 0 - timestamp; // never -0
  const bare = dated && at === to;
  const data = dated && !bare && text[at] === "," && text.slice(at + 1, to);
  const tag = text[from]!;
  if (bare && "0123456789*#ABCD".includes(tag)) return { type: "dtmf", timestamp, digit: tag as Digit };
  if (data && tag === "F") return { type: "finished", timestamp, file: data };
  if (data && tag === "T") return { type: "interrupted", timestamp, file: data };
  if (data && tag === "D") return { type: "dropped", timestamp, file: data };
  if (data && tag === "Z") return { type: "failed", timestamp, reason: data };
  if (data && tag === "G") return { type: "variables", timestamp, data };
  if (data && tag === "P") return { type: "params", timestamp, params: data.split(",") };
  if (data && tag === "I") return { type: "inform", timestamp, message: data };
  if (bare && tag === "T") return { type: "interrupted", timestamp };
  if (bare && tag === "Z") return { type: "failed", timestamp };
  if (bare && tag === "H") return { type: "hangup", timestamp };
  if (bare && tag === "E") return { type: "exit", timestamp };
  return { type: "unknown", line: text.slice(from, to) };
}

/**
 * Writes an event as Asterisk does, with its newline: the other direction of {@linkcode parseEvent}, for hosts and
 * tests.
 *
 * @throws {IvrError} `invalid` for what would not be read as it was written: a CR, LF or NUL, an empty text, half of a
 * surrogate pair, a comma in one of the `params`, a timestamp that is no integer, an `unknown` line that means something.
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
  return format(event, EVENTS, parseEvent);
}

/**
 * A line of each type. From how it is read `format` learns how to write it: its tag, and its fields in their order. So a
 * new type needs a line here, besides its place in the union and in the parser; a new field may need one in `WRITERS` and
 * `RULES`.
 */
const EVENTS = "1,0 F,0,0 T,0,0 D,0,0 Z,0,0 P,0,0 G,0,0 I,0,0 H,0 E,0 ?".split(" ");

/** Bytes as a `TextEncoder` makes them: never of shared memory, which the types of some streams refuse. */
export type Bytes = ReturnType<InstanceType<typeof TextEncoder>["encode"]>;

const encode = (text: string): Bytes => new TextEncoder().encode(text);

/** An event or command by the names of its fields. */
type Fields = { [field: string]: unknown };

/** How fields are written whose text is not just their value. */
const WRITERS: { [field: string]: (value: unknown) => unknown } = {
  timestamp: (value) => String(value).padStart(10),
  on: (value) => value ? "autoclear" : "noautoclear",
  variables: (value) => Object.entries(value as Fields).map((pair) => pair.join("=")),
};

/**
 * Puts what is meant into the example of its type, and reads the line again after each field: refuses the field with which
 * it does not read as it was meant, has a character that no line can carry (half of a surrogate pair arrives as something
 * else), or fails otherwise. The first field, which may be long, is put in last, and so blamed for the length of the line.
 */
function format(meant: Fields, examples: string[], parse: (line: string) => Fields, fails?: (line: string) => boolean) {
  const doing = "send " + String(meant["type"]);
  let line = examples.find((each) => parse(each)["type"] === meant["type"]) ?? refuse(doing, "type", meant["type"]);
  const parts: unknown[] = line.split(",");
  const fields = parse(line);
  const names = Object.keys(fields);
  for (let field; (field = names.pop()!) !== "type";) { // which stands first
    const value = meant[field];
    if (value === undefined && fields[field] === meant["type"]) continue; // the type stays in its place
    fields[field] = value;
    try {
      // Fields and parts stand in the same order, but that a key, or an unknown line, stands where the tag does
      parts[names.length % parts.length] = WRITERS[field]?.(value) ?? value;
      if (parts.at(-1) === undefined) parts.pop();
      line = parts.join();
      const same = JSON.stringify(fields) === JSON.stringify(parse(line));
      if (same && !/[\r\n\0\p{Cs}]/u.test(line) && !fails?.(line)) continue;
    } catch { /* no text at all */ }
    refuse(doing, field, value);
  }
  return line + "\n";
}

/** What a field has to be that has no rule of its own. */
const RULE = "valid text on one line, not empty, in a command up to 1022 bytes not ending in a blank; " +
  "in lists without commas, names without equals signs";

/** What other fields have to be. */
const RULES: { [field: string]: string } = {
  type: "known",
  line: "unknown, on one line, up to 1022 bytes",
  timestamp: "a whole number",
  interval: "a whole number from 0",
  duration: "a whole number from 0",
  on: "a boolean",
  digit: "one of 0-9 * # A-D",
  digits: "keys 0-9 * # A-D w W f F, up to 1022 bytes",
};

/** Throws for a value: names it, and the rule. */
function refuse(doing: string, field: string, value: unknown, rule = RULES[field] ?? RULE): never {
  let shown: string = typeof value;
  try {
    shown = shown === "number" ? String(value) : JSON.stringify(value) ?? shown; // or NaN would be null
  } catch { /* a value that no text shows */ }
  throw new IvrError("invalid", `Cannot ${doing}: ${field} ${shown.slice(0, 200)} has to be ${rule}`, { field });
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
 *   held for `duration` milliseconds (absent or 0: Asterisk's default). `a` to `d` are the keys `A` to `D`, `w` waits
 *   for half a second, `W` for a second, `f` and `F` flash the hook.
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
  | { type: "dtmf"; digits: string; interval?: number | undefined; duration?: number | undefined }
  | { type: "autoclear"; on: boolean }
  | { type: "set"; variables: Record<string, string> }
  | { type: "get"; names: string[] }
  | { type: "params" }
  | { type: "log"; message: string }
  | { type: "hangup"; message?: string | undefined }
  | { type: "exit"; message?: string | undefined }
  | { type: "unknown"; line: string };

/**
 * A line of each type, as in `EVENTS`. Asterisk ignores one without a payload: the type fills its place where nothing has to
 * be said.
 */
const COMMANDS = "S,0 A,0 I,interrupt T,answer D,0,0,0 O,autoclear V,0 G,0 P,params L,0 H,hangup E,exit ?".split(" ");

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
  const [, letter, payload = ""] = /^(.)[^\0]([^\0]*[^\0- ])/s.exec(line) ?? [];
  if (letter === "D" && /^[\da-dfw*#]+(,\d*)?(,\d*)?$/i.test(payload)) {
    const [digits = "", interval, duration] = payload.split(",");
    return { type: "dtmf", digits, ...interval && { interval: +interval }, ...duration && { duration: +duration } };
  }
  if (letter === "S") return { type: "play", file: payload };
  if (letter === "A") return { type: "queue", file: payload };
  if (letter === "G") return { type: "get", names: payload.split(",") };
  if (letter === "V") return { type: "set", variables: variablesIn(payload.split(",")) };
  if (letter === "L") return { type: "log", message: payload };
  if (letter === "H") return { type: "hangup", message: payload };
  if (letter === "E" || letter === "X") return { type: "exit", message: payload };
  if (letter === "P") return { type: "params" };
  if (letter === "I") return { type: "interrupt" };
  if (letter === "T") return { type: "answer" };
  if (letter === "O" && /^(no)?autoclear$/i.test(payload)) return { type: "autoclear", on: /^a/i.test(payload) };
  return { type: "unknown", line: line.replace(/\r?\n$/, "") };
}

/** What stands before the first equals sign is the name, the rest the value. */
function variablesIn(pairs: string[]): Record<string, string> {
  // `fromEntries` takes "__proto__" as a name like any other
  return Object.fromEntries(pairs.map((pair) => /([^=]*)=?(.*)/s.exec(pair)!.slice(1)));
}

/**
 * Writes a command with its newline. The payload is never empty, since Asterisk ignores a command without one.
 *
 * @throws {IvrError} `invalid` for what Asterisk would not read as it was written: a text that is empty or ends with a
 * blank, a CR, LF or NUL, half of a surrogate pair, a comma in a variable's name or value, an equals sign in a name, a
 * key that does not exist, more than 1022 bytes.
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
export function formatCommand(command: IvrCommand): string {
  // Asterisk cuts a longer line, and runs the rest of it as the next command. What else reads back and means nothing: an
  // empty name, a blank at a value's end, an equals sign in a name that is asked
  const fails = (line: string) => encode(line).length > 1022 || /^V.*(,=|[\0- ],)|^G.*(=|,,|,$)/s.test(line);
  return format(command, COMMANDS, parseCommand, fails);
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
  const pairs: string[] = [];
  for (const part of data.split(",")) {
    if (part.startsWith(`${names[pairs.length] ?? ","}=`)) pairs.push(part); // behind the last name no pair begins
    else if (pairs.length) pairs.push(pairs.pop() + "," + part);
  }
  return variablesIn(pairs);
}

// ---------------------------------------------------------------------------------------------------------
// 3. Lines: bytes to lines, and what waits
// ---------------------------------------------------------------------------------------------------------

/** Where bytes come from: a `ReadableStream<Uint8Array>` of any runtime, or as much of one as is used. */
export interface Source {
  /** Takes the stream for this reader alone. */
  getReader(): {
    /** The next chunk, or `done`. */
    read(): Promise<{ done: boolean; value?: Uint8Array | undefined }>;
    /** Gives the stream up. */
    cancel(reason?: unknown): Promise<void>;
    /** Gives the stream back. */
    releaseLock(): void;
  };
}

/** Where bytes go: a `WritableStream<Uint8Array>` of any runtime, or as much of one as is used. */
export interface Sink {
  /** Takes the stream for this writer alone. */
  getWriter(): {
    /** Takes a chunk; settles when it went out. Not called again, nor is `close`, before that. */
    write(chunk: Bytes): Promise<void>;
    /** Ends the stream after what was written. */
    close(): Promise<void>;
    /** Ends the stream at once. Called for one that has closed as well, which has nothing to do then. */
    abort(reason?: unknown): Promise<void>;
  };
}

/** How much may wait. */
export interface LinesOptions {
  /**
   * How many characters may wait, a bound on memory: those of a line that is not complete, its CR among them, and in a
   * {@linkcode Session} those of the events that nobody has taken as well, each with its newline. In memory an event takes
   * some hundred bytes more. The default is 1 MiB.
   *
   * @default 1048576
   */
  maxBuffer?: number | undefined;
}

/**
 * The lines of a stream of bytes, without their `\n` or `\r\n`, wherever the chunks were cut. A last line without a
 * newline is a line too. Bytes are UTF-8; malformed ones become U+FFFD. Leaving the loop cancels the stream.
 *
 * A line may be a slice of its chunk's text: who keeps the line keeps the chunk in memory.
 *
 * @throws {IvrError} `overflow` when a line exceeds `maxBuffer`, after the lines before it; `invalid` for a `maxBuffer`
 * that is no number from 1.
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
export async function* lines(readable: Source, options?: LinesOptions): AsyncGenerator<string, void, void> {
  const backlog = new Backlog(options);
  const reader = readable.getReader();
  try {
    for (let chunk: Chunk = { done: false }; !chunk.done;) {
      chunk = await reader.read();
      const found: string[] = [];
      try {
        backlog.split(chunk, (text, from, to) => found.push(text.slice(from, to)));
      } finally {
        yield* found; // those before a line that is too long, as well
      }
    }
  } finally {
    await reader.cancel().catch(ignore);
  }
}

const ignore = (): void => {};

/** Gives the value back when it is a number in range. */
function checkNumber(doing: string, field: string, value: unknown, least: number): number {
  return typeof value === "number" && value >= least ? value : refuse(doing, field, value, `a number from ${least}`);
}

/** What a source brings: some bytes, or its end. */
type Chunk = Awaited<ReturnType<ReturnType<Source["getReader"]>["read"]>>;

/** What an event may wait behind: another, or the backlog itself. */
type Place = Pick<Link, "next">;

/** An event that waits, and its length in characters. */
type Link = { next: Link | undefined; event: IvrEvent; length: number };

/**
 * What came and nobody has taken: an unfinished line and, in a session, events in their order. One bound holds for both.
 *
 * Adding costs the same however much waits, and so does taking the oldest of a kind: who wants another kind than the
 * oldest is of goes on where the last one stopped.
 */
class Backlog {
  readonly maxBuffer: number;
  rest = ""; // a line whose end is in a later chunk
  overflow?: IvrError; // too much waited
  length = 0; // of the events, in characters
  next: Link | undefined; // the oldest
  #last: Place = this; // the youngest, if any
  #run: Place = this; // all up to it are of the kind of the oldest: who wants the other one looks behind it
  #decoder?: InstanceType<typeof TextDecoder>; // made with the first bytes: a quiet call costs none

  constructor({ maxBuffer = 2 ** 20 }: LinesOptions = {}) {
    this.maxBuffer = checkNumber("read", "maxBuffer", maxBuffer, 1);
  }

  /**
   * Cuts the next chunk into lines, and hands on each where it stands in the text of its chunk. The end ends the last line
   * as well, whatever comes with it. Throws where a line is too long.
   */
  split({ done, value }: Chunk, hand: (text: string, from: number, to: number) => void): void {
    // The types of Workers ask for `fatal` as well, the runtimes do not
    this.#decoder ??= new TextDecoder(undefined, { ignoreBOM: true } as { ignoreBOM: true; fatal: boolean });
    const text = this.#decoder.decode(value, { stream: !done });
    let from = 0;
    // Only what is new is searched: a long line in small chunks would take for ever
    for (let end; (end = text.indexOf("\n", from)) >= 0; from = end + 1) {
      const line = this.rest ? this.rest + text.slice(0, end) : text;
      let to = this.rest.length + end; // what is left of the chunk before stands in front of the first
      this.rest = "";
      this.check(to - from);
      if (line[to - 1] === "\r") to--;
      hand(line, from, to);
    }
    this.rest += text.slice(from);
    this.check(this.rest.length);
    if (done && this.rest) this.split({ done: false, value: encode("\n") }, hand);
  }

  /** Throws when so many are too many. */
  check(count: number, most = this.maxBuffer): void {
    if (count > most) throw this.overflow = new IvrError("overflow", `Cannot keep more than ${most} characters`);
  }

  /** Whether more waits than may wait, or than a part of it. */
  full(part = 1): boolean {
    return this.length + this.rest.length > this.maxBuffer * part;
  }

  add(event: IvrEvent, length: number): void {
    this.length += length;
    const link: Link = { next: undefined, event, length };
    this.#last = this.#last.next = link;
  }

  /** Takes the oldest event, or the oldest key, or the oldest other one. */
  take(wanted?: "dtmf" | "other"): IvrEvent | undefined {
    // Whether what stands behind a place is not wanted
    const past = (place: Place) => place.next && (place.next.event.type === "dtmf") !== (wanted === "dtmf");
    let before: Place = wanted && past(this) ? this.#run : this;
    while (wanted && past(before)) this.#run = before = before.next!;
    const link = before.next;
    if (!link) return undefined;
    before.next = link.next;
    if (this.#last === link) this.#last = before;
    if (this.#run === link) this.#run = before;
    link.next = undefined; // or an old one that is garbage would keep the young ones behind it
    this.length -= link.length;
    return link.event;
  }
}

// ---------------------------------------------------------------------------------------------------------
// 4. Session: the connection
// ---------------------------------------------------------------------------------------------------------

// The state and its life. A call has two stores: what came and nobody has taken (`#backlog`), and what was asked and
// is not answered (`#asked`). `#read` hands every event to `#receive`, which puts it where it belongs:
//
// 1. an answer settles the oldest command that asked for its name, and goes no further; a `Z` fails the oldest command
//    of all, since commands are carried out in order, and leaves it there until its acknowledgement comes;
// 2. the layer above sees every other line that is whole, and no `Z` (`seen`);
// 3. all but the answers, so a `Z` too, wait in the backlog until somebody takes them.
//
// Who finds nothing waits in `when` for anything to change: `notify` lets them look again, the layer above among them.
//
// While something is asked, or we asked for the end, `#nextWake` wakes Asterisk. Its last words, or a stream that breaks,
// stop that: then it is known how the call ends (`#ending`), nothing more can be asked, and the stream of events has a
// second to end too (`#deadline`). The signal tells (`#abort`); with option `i` it does so earlier, and the call goes on.
// With that a menu settles its prompts; commands may still have an answer on its way. Every call comes to `#finish`: what
// waits is settled, and both streams close (`#closing`).
//
// Where things go: an event into section 1 alone, but that the fields `data`, `params`, `message` and `file` have their
// meaning here and in section 5; a command with an answer of its own into `Reply`, `Asked`, `ask` and `#receive`; another
// way to end into `Ending`, `#receive` and `#finish`, and into `#leaving` and `ask` where it is ours.

/** Limits of a {@linkcode Session}. */
export interface SessionOptions extends LinesOptions {
  /**
   * Milliseconds of silence after which Asterisk is asked for a sign of life; when none comes for as long again, the call
   * is over as `disconnect`. Finds peers that are gone without a word, and keeps TCP proxies from cutting long prompts.
   * Choose more than the longest `sendDtmf` takes: Asterisk says nothing meanwhile. The default is never.
   *
   * @default Infinity
   */
  keepAlive?: number | undefined;
}

/** How a call ended. */
export interface Ending {
  /**
   * Who ended the call: `caller` and `hangup` are the caller's `H` and ours, `exit` is `E`; a stream that breaks after we
   * asked for `H` or `E` is as good as the answer. `disconnect` is any other end of the stream, or our `close`. `error` is a
   * limit of the session.
   */
  by: "caller" | "hangup" | "exit" | "disconnect" | "error";
  /** With `error` the {@linkcode IvrError}; with `disconnect` what broke the stream, if it broke. */
  error?: unknown;
}

/** What the promise of a command brings: the data of a `G` (see {@linkcode parseVariables}), the elements of a `P`, or nothing. */
export type Reply<Command extends IvrCommand> = Command extends { type: "get" } ? string
  : Command extends { type: "params" } ? string[]
  : void;

/** An event, by fields that some of them have: only answers have `data` or `params`, only `inform` a `message`. */
type EventFields = { type: string; data?: string; params?: string[]; message?: string; reason?: string | undefined };

/**
 * A command that awaits its answer, a `G` of this name or a `P`, which has none. Its type is for a refusal, behind which
 * `fail` is `ignore`.
 */
type Asked = { type: string; name: string | undefined; done(reply?: unknown): void; fail(error: IvrError): void };

/** How long a stream may take to end behind the last words: milliseconds. */
const GRACE = 1000;

/** How many characters of commands may wait to be written, a command that awaits its answer counted as fifty. */
const MAX_OUT = 1_000_000;

/**
 * A part of what may wait. When more does, reading lets loops catch up first, since what waits for long costs a collector
 * more; and where there is no loop, an event that a promise has told is not added.
 */
const AHEAD = 1 / 16;

const callEnded = (cause?: unknown): IvrError => new IvrError("ended", "The call ended", { cause });

type Timer = ReturnType<typeof setTimeout> | undefined; // `clearTimeout(timer!)`: the types of Workers take no undefined

/** A timer that keeps no process alive, or for no longer than a turn of the event loop. */
function later(run: () => void, ms: number): Timer {
  if (ms >= 2 ** 31) return undefined; // it would go off at once
  const timer = setTimeout(run, ms);
  if (ms) (timer as { unref?(): void }).unref?.();
  return timer;
}

/** A turn of the event loop. What is known at once takes one, so that a loop around it lets others run. */
const turn = (): Promise<void> => new Promise((resolve) => setTimeout(resolve));

/** A promise that nobody has to await: no rejection of it is unhandled, and each comes a turn later. */
function quiet<T>(promise: Promise<T>): Promise<T> {
  promise = promise.catch((error) => turn().then(() => Promise.reject(error)));
  promise.catch(ignore);
  return promise;
}

/**
 * A live call over any pair of streams: events come in, commands go out. {@linkcode Ivr} adds the words of a menu.
 *
 * It reads from the constructor on, whatever the user's code does: Asterisk writes from the thread that carries the audio,
 * so a reader that stops freezes the call. What nobody has taken waits, within {@linkcode LinesOptions.maxBuffer}; only who
 * takes event after event is given a moment when much waits.
 *
 * A command's promise resolves when Asterisk has carried it out and rejects with an {@linkcode IvrError}: `invalid` before
 * anything is sent, `refused` when Asterisk answers `Z`, `ended` when the call ends first, or is over already. A promise
 * that nobody awaits is never an unhandled rejection; one of an `async` function of yours, which awaits it, is yours to catch.
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
 * async function beepAtKeys(streams: { readable: Source; writable: Sink }) {
 *   const session = new Session(streams);
 *   for await (const event of session) {
 *     if (event.type === "dtmf") session.send({ type: "play", file: "beep" });
 *   }
 * }
 * ```
 */
export class Session {
  #reader: ReturnType<Source["getReader"]>;
  #writer: ReturnType<Sink["getWriter"]>;
  #backlog: Backlog;

  // What came
  #loops = 0; // iterators that nobody has left
  #waiting: (() => void)[] = []; // who looks again when anything has changed, the oldest first
  #keepAlive: number;

  // What went out
  #out = ""; // with the next write
  #written?: Promise<void>; // the writes before
  #asked: Asked[] = []; // in order
  #count = 0; // of acknowledgements asked for
  #nextWake: Timer; // the next wake-up

  // The end
  #leaving?: "hangup" | "exit"; // what we asked for
  #deadline: Timer; // how long we wait for a sign of life, for the end of the stream, for our streams to close
  #abort = new AbortController(); // tells that the caller is gone; with option `i` the call goes on
  #ending?: Ending | undefined; // as soon as it is known
  #closed?: Promise<Ending>;
  #closing?: Promise<void>; // of both streams: there as soon as the call is over

  /**
   * Takes both streams and starts to read.
   *
   * @throws {IvrError} `invalid` for options out of range.
   * @throws {TypeError} when one of the streams is locked already; the other one is free then.
   */
  constructor(streams: { readable: Source; writable: Sink }, options?: SessionOptions) {
    this.#backlog = new Backlog(options);
    this.#keepAlive = checkNumber("read", "keepAlive", options?.keepAlive ?? Infinity, 1);
    this.#reader = streams.readable.getReader();
    try {
      this.#writer = streams.writable.getWriter();
    } catch (error) {
      this.#reader.releaseLock();
      throw error;
    }
    this.#read();
  }

  /** How the call ended, as soon as it has; the streams may still be closing. Never rejects. */
  get closed(): Promise<Ending> {
    return this.#closed ??= this.when(() => this.#closing && this.#ending) as Promise<Ending>;
  }

  /**
   * Aborted when the caller is gone, with an `ended` error as its reason: on `H`, `E`, `I,…,HANGUP`, and however else the
   * call ends. Hand it to `fetch`.
   */
  get signal(): AbortSignal {
    return this.#abort.signal;
  }

  /**
   * Sends a command. The promise brings the {@linkcode Reply} of a `get` or `params`, which the iterator does not see.
   * That of `hangup` and `exit` resolves when the call is over, whoever ended it; only the first of them is sent.
   */
  send<Command extends IvrCommand>(command: Command): Promise<Reply<Command>> {
    return quiet(new Promise((resolve, reject) => this.ask(command, resolve as (reply: unknown) => void, reject)));
  }

  /**
   * Closes the streams without a word, whereupon Asterisk hangs up. What was sent before still goes out, unless a stream
   * broke. Resolves when both are closed, or after a second if one does not close. Never rejects.
   */
  close(): Promise<void> {
    this.#end({ by: "disconnect" });
    return this.#closing ??= this.#finish();
  }

  /**
   * Every event that nothing else asked for, in order, each once: two loops share them. Leaving the loop leaves the
   * session as it is. The loop ends with the call, and throws only when a limit of the session ended it.
   */
  [Symbol.asyncIterator](): AsyncIterableIterator<IvrEvent, undefined> {
    type Result = IteratorResult<IvrEvent, undefined>;
    let left = false;
    this.#loops++;
    const wait = async (): Promise<Result> => {
      let value: IvrEvent | undefined;
      await this.when(() => left || (value = this.take()));
      if (!value && !left && this.#ending!.by === "error") throw this.#ending!.error;
      return { value, done: !value } as Result;
    };
    const iterator: AsyncIterableIterator<IvrEvent, undefined> = {
      next: () => {
        const value = !left && this.take(); // here as well: most often one waits, and `when` costs more
        return value ? Promise.resolve({ value, done: false }) : quiet(wait());
      },
      return: () => {
        if (!left) this.#loops--;
        left = true;
        this.notify();
        return wait();
      },
      [Symbol.asyncIterator]: () => iterator,
    };
    return iterator;
  }

  /** Takes the oldest event that waits, or the oldest key, or the oldest that is none: nobody else will see it. */
  protected take(wanted?: "dtmf" | "other"): IvrEvent | undefined {
    const event = this.#backlog.take(wanted);
    if (event && !this.#backlog.length) this.notify(); // reading may wait for it
    return event;
  }

  /**
   * Looks now, and again whenever anything has changed, until something is found. When the time has passed, or the call is
   * over, it looks once more, a turn of the event loop later: who asks again and again does not stop the process.
   */
  protected when<Found>(look: () => Found | undefined, ms: number = Infinity): Promise<Found | undefined> {
    return new Promise((resolve) => {
      let late = false;
      const timer = later(() => (late = true, this.notify()), ms);
      const again = (): void => {
        const found = look();
        if (found || late || this.#closing) {
          clearTimeout(timer!);
          resolve(found || turn().then(look));
        } else this.#waiting.push(again);
      };
      again();
    });
  }

  /** Lets everybody who waits in {@linkcode Session.when} look again. */
  protected notify(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const again of waiting) again(); // who finds nothing waits again
  }

  /**
   * Sees each event as it comes, before anybody can take it: all but answers, `failed`, and a line without its newline.
   * Returns something when a promise tells of it already.
   */
  protected seen?(event: IvrEvent): unknown;

  /**
   * Sends a command, as `send` does: `done` or `fail` is called as soon as it is known what became of it, before anything
   * behind the answer is looked at. A refused one fails at its `Z`, and is done as well when it is acknowledged. Throws what
   * was wrong with the command, or that the call is over.
   */
  protected ask(command: IvrCommand, done: (reply?: unknown) => void, fail: (error: IvrError) => void): void {
    const { type, names }: { type: string; names?: string[] } = command;
    let text = formatCommand(command);
    if (type === "hangup" || type === "exit") {
      this.when(ignore).then(done); // a turn of the event loop later: who asks again and again does not stop the process
      if (this.#leaving || this.#ending) return;
      this.#leaving = type;
    } else {
      if (this.#ending) throw callEnded(); // Asterisk reads nothing behind its last words
      const asks = type === "get" || type === "params";
      const name = asks ? names?.[0] : `EIVR_ACK_${++this.#count}`;
      if (!asks) text += `G,${name}\n`;
      this.#asked.push({ type, name, fail, done: asks ? done : () => done() });
    }
    this.#write(text);
  }

  async #read(): Promise<void> {
    try {
      let length: number | false | undefined; // of what was too much before the moment
      do {
        this.#probe(); // anew each time: silence counts only while we read
        // Loops are given a moment to take what waits. Too much is too much only when none of it was taken
        if (this.#backlog.full(this.#loops ? AHEAD : 1)) await this.when(() => !this.#backlog.length, 0);
        if (this.#backlog.length === length) this.#backlog.check(Infinity);
        length = this.#backlog.full() && this.#backlog.length;
      } while (length || this.#hear(await this.#reader.read()));
    } catch (error) {
      await undefined; // a source that throws at once does so before the layer above is made
      this.#end({ by: "disconnect", error: error || callEnded() }); // some streams give no reason
    }
    this.close();
  }

  /** Takes what a chunk brings, and tells whether there may be more. Apart from `#read`, which would keep the chunk. */
  #hear(chunk: Chunk): boolean {
    this.#backlog.split(chunk, (text, from, to) => this.#receive(eventIn(text, from, to), to - from + 1, chunk.done));
    this.notify();
    this.#backlog.check(this.#out.length + 50 * this.#asked.length, MAX_OUT);
    return !chunk.done && !this.#closing;
  }

  /** Asks for a sign of life after a silence, and ends the call after another. */
  #probe(): void {
    if (this.#keepAlive === Infinity || this.#ending) return;
    this.#within(this.#keepAlive, () => {
      this.send({ type: "unknown", line: "" }); // for its acknowledgement
      this.#within(this.#keepAlive, () => this.close());
    });
  }

  /** Does something after so long, unless another deadline takes its place. */
  #within(ms: number, then: () => void): void {
    clearTimeout(this.#deadline!);
    this.#deadline = later(then, ms);
  }

  /** Puts an event where it belongs. */
  #receive(event: IvrEvent, length: number, atEnd: boolean): void {
    const { type, data, message, params, reason }: EventFields = event;
    let told: unknown;
    if (this.#closing) return; // it was on its way when we closed
    // What comes with the end may be incomplete: it may end the call, but it answers nothing
    if (!atEnd) {
      const head = this.#asked[0];
      const reply = head && (data ?? params);
      if (reply) {
        const name = data?.split("=", 1)[0];
        const at = this.#asked.findIndex((asked) => asked.name === name);
        if (at >= 0) {
          this.#asked.splice(at, 1)[0]!.done(reply);
          return this.#wake();
        }
      }
      if (type !== "failed") told = this.seen?.(event);
      else if (head && head.fail !== ignore) {
        head.fail(new IvrError("refused", `Asterisk refused ${head.type}: ${reason ?? "channel not up"}`, { reason }));
        told = head.fail = ignore; // what else comes before its acknowledgement is nobody's
      }
    }
    if (told && !this.#loops && this.#backlog.full(AHEAD)) return; // nobody wants it
    this.#backlog.add(event, length);
    if (type === "hangup" || type === "exit") {
      if (this.#ending?.error) this.#ending = undefined; // writing broke, and who ended the call was a guess
      this.#end({ by: type === "exit" || type === this.#leaving ? type : "caller" });
    }
    if (message === "HANGUP") {
      this.#abort.abort(callEnded());
      this.notify(); // what stands behind it in its chunk comes too late for a prompt
    }
  }

  /** Writes in one go what is asked without a pause between, or while the write before takes its time. A wake-up follows. */
  #write(text: string, delay?: number): void {
    this.#wake(delay);
    this.#out += text;
    this.#written = Promise.resolve(this.#written).then(async () => {
      text = this.#out;
      this.#out = "";
      if (text) await this.#writer.write(encode(text));
    }); // behind a write that broke there is no other
    // Not `close`: Asterisk's last words may still come
    this.#written.catch((error) => this.#end({ by: "disconnect", error: error || callEnded() }));
  }

  /** Wakes Asterisk while something is awaited: a millisecond after a command or an answer, then ever more slowly. */
  #wake(delay = 1): void {
    clearTimeout(this.#nextWake!);
    if (this.#ending || !this.#asked[0] && !this.#leaving) return;
    this.#nextWake = later(() => this.#write("\n", Math.min(delay * 2, 1000)), delay);
  }

  /** How the call ends is known: if the stream of events does not end by itself, we end it. */
  #end(ending: Ending): void {
    if (this.#ending) return;
    this.#ending = ending;
    this.#within(GRACE, () => this.close());
    this.#wake(); // not any more
    this.#abort.abort(callEnded());
    this.notify();
  }

  /**
   * Settles what waits, and closes both streams: what was sent goes out first, unless something broke or the peer does not
   * take it.
   */
  async #finish(): Promise<void> {
    const { error } = this.#ending!;
    if (error && error === this.#backlog.overflow) this.#ending!.by = "error"; // not a stream that broke with one
    // A reset after our own H or E is Asterisk closing with our wake-ups unread
    else if (error && this.#leaving) this.#ending = { by: this.#leaving };
    const ended = callEnded(error);
    for (const { fail } of this.#asked) fail(ended);
    const grace = new Promise<void>((resolve) => this.#within(GRACE, resolve));
    // A socket that ends by itself, as Node's do, is to do so first: Deno fails when both close it in one turn
    await turn();
    this.notify();
    if (!error) {
      await Promise.race([grace, Promise.resolve(this.#written).then(() => this.#writer.close())]).catch(ignore);
    }
    this.#out = ""; // what did not go out in time never does
    // In a `then`, of whatever is settled, since a stream of any make may throw at once
    await Promise.race([grace, this.closed.then(() => this.#writer.abort(error))]).catch(ignore);
    await Promise.race([grace, this.closed.then(() => this.#reader.cancel())]).catch(ignore);
    clearTimeout(this.#deadline!);
  }
}

// ---------------------------------------------------------------------------------------------------------
// 5. Ivr: a menu
// ---------------------------------------------------------------------------------------------------------

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

/** What {@linkcode Ivr.gather} plays, collects and waits for. */
export interface GatherOptions {
  /** Files to play first, queued behind what plays already. */
  prompt?: string | string[] | undefined;
  /**
   * Done with so many digits. The default is no limit.
   *
   * @default Infinity
   */
  maxDigits?: number | undefined;
  /**
   * Each of these keys ends the input and is no part of it. The default is `"#"`.
   *
   * @default "#"
   */
  terminators?: string | undefined;
  /**
   * Milliseconds to the first key, from the end of the prompts. The default is 5000; `Infinity` waits for ever.
   *
   * @default 5000
   */
  timeout?: number | undefined;
  /**
   * Milliseconds to each further key. The default is `timeout`.
   *
   * @default timeout
   */
  interDigitTimeout?: number | undefined;
  /**
   * Whether the first key interrupts the prompts, and a key that waits already skips them. The default is `true`.
   *
   * @default true
   */
  bargeIn?: boolean | undefined;
  /**
   * Whether keys pressed before are thrown away rather than taken (type-ahead). The default is `false`.
   *
   * @default false
   */
  flush?: boolean | undefined;
  /** Ends the gathering early. */
  signal?: AbortSignal | undefined;
}

/** What was gathered, and why it ended there. */
export interface Gathered {
  /** The keys, without the terminator. */
  digits: string;
  /** Why the gathering ended. */
  reason: "maxDigits" | "terminator" | "timeout" | "hangup" | "aborted";
  /** The key that ended it, if one did. */
  terminator?: Digit;
  /** What became of each prompt, in order. Empty when none was queued: a key skipped them, or `signal` was aborted. */
  outcomes: Outcome[];
}

/** What is in Asterisk's playlist, as far as we know: a file and who wants to know of it, or an `I` that clears it. */
type Prompt = { file: string | undefined; tell: ((outcome: Outcome) => void) | undefined };

/**
 * A line of any text as messages that fit, since no character takes more than four bytes: no control characters, no halves
 * of characters, no blanks at their ends.
 */
function messages(line: unknown): string[] {
  const text = String(line).replace(/\p{Cc}/gu, " ").replace(/\p{Cs}/gu, "?");
  return text.split(/([ -~]{255,1020}|.{255})/su).map((piece) => piece.trimEnd()).filter(Boolean);
}

/**
 * A call as a menu sees it: a {@linkcode Session} that knows what becomes of each prompt, and gathers keys.
 *
 * Two styles, alone or together: each method returns a promise, and `for await (const event of ivr)` gives every event
 * that nothing else asked for. What became of a prompt reaches both, but is not kept for a loop where there is none and
 * room is short. Keys go to the {@linkcode Ivr.gather} under way, and wait for the next one or for the iterator otherwise.
 *
 * What is under way when the call ends settles with that: `play` and `queue` resolve with `ended`, `gather` with
 * `hangup`, the others reject with `ended`. Whatever is asked for behind `H`, `E` or the end of the stream rejects with
 * `ended`. `hangup` and `exit` resolve in either case. With the dialplan's option `i` the call goes on without its caller:
 * then `gather` alone rejects, and `play` and `queue` resolve with `refused` or `ended`, whichever is known first.
 *
 * Each method rejects with an {@linkcode IvrError}: `invalid` before anything is sent, `refused` when Asterisk answers `Z` (but
 * `play` and `queue`, whose outcome says so), `ended`; `get` with `truncated`, too.
 */
export class Ivr extends Session {
  #playlist: Prompt[] = []; // in order
  #gathering?: "other" | undefined; // set while keys are gathered: what the iterators may take meanwhile

  /** Once the caller is gone nobody hears what waits in the playlist. */
  protected override notify(): void {
    if (this.signal.aborted) this.#tell("ended");
    super.notify();
  }

  /** Clears the playlist, plays the file, and resolves with what became of it. */
  play(file: string): Promise<Outcome> {
    return quiet(new Promise((resolve) => this.ask({ type: "play", file }, ignore, ignore, resolve)));
  }

  /** Plays the file after what waits in the playlist, and resolves with what became of it. */
  queue(file: string): Promise<Outcome> {
    return quiet(new Promise((resolve) => this.ask({ type: "queue", file }, ignore, ignore, resolve)));
  }

  /** Stops what plays and clears the playlist. Asterisk has it from version 11 on. */
  interrupt(): Promise<void> {
    return this.send({ type: "interrupt" });
  }

  /** Answers the channel, for the dialplan's option `n`. */
  answer(): Promise<void> {
    return this.send({ type: "answer" });
  }

  /** Lets each key interrupt and clear the playlist by itself, or not. */
  autoclear(on: boolean): Promise<void> {
    return this.send({ type: "autoclear", on });
  }

  /**
   * Sets channel variables, or functions like `CALLERID(name)`, for the dialplan to read. No value can hold a comma, a line
   * break or a blank at its end: `encodeURIComponent` here, `URIDECODE` in the dialplan.
   */
  set(variables: Record<string, string>): Promise<void> {
    return this.send({ type: "set", variables });
  }

  /**
   * Presses keys toward the caller, `interval` milliseconds apart (250 if not given, or 0), each for `duration` milliseconds
   * (Asterisk's own if not given, or 0); `w` and `W` are pauses of half a second and a second. Asterisk does nothing else
   * meanwhile. It has this from version 1.8 on.
   */
  sendDtmf(digits: string, options?: { interval?: number | undefined; duration?: number | undefined }): Promise<void> {
    return this.send({ type: "dtmf", digits, ...options });
  }

  /**
   * Writes any text to Asterisk's log: each line by itself, control characters as blanks, and a long line in pieces of 1020
   * characters of ASCII, or of 255 of any others, which fit whatever they take.
   */
  log(text: string): Promise<void> {
    const pieces = String(text).split(/[\r\n]/).flatMap(messages);
    return quiet(this.#all(pieces.map((message) => ({ type: "log", message }))).then(ignore));
  }

  /**
   * Reads channel variables, or globals, one `G` a name. An unset one is empty; so are functions like `CALLERID(num)` and
   * built-ins like `EXTEN`, which the dialplan has to copy into a variable first.
   *
   * Rejects with `truncated` when Asterisk may have cut a value: at 2047 bytes of name, equals sign and value, or at
   * 2046, since a comma at the cut is lost as well.
   */
  get(...names: string[]): Promise<Record<string, string>> {
    return quiet(
      this.#all(names.map((name) => ({ type: "get", names: [name] }))).then((replies) => {
        const partial = variablesIn(replies);
        const cut = names.find((name) => encode(name + partial[name]).length >= 2045); // and an equals sign
        if (cut) throw new IvrError("truncated", `Cannot get more than 2047 bytes of ${cut}`, { partial });
        return partial;
      }),
    );
  }

  /**
   * Reads the dialplan's call: the command itself (`ivr://host` or the program's path), then its arguments. One with a
   * comma in it comes as two.
   */
  params(): Promise<string[]> {
    return this.send({ type: "params" });
  }

  /**
   * Ends the call with a message for the log: any text, on one line, cut to what fits as in {@linkcode Ivr.log}. Resolves
   * when the call is over, whoever ended it.
   */
  hangup(text = ""): Promise<void> {
    return this.send({ type: "hangup", message: messages(text)[0] });
  }

  /** Goes on in the dialplan, with a message for the log. Otherwise as {@linkcode Ivr.hangup}. */
  exit(text = ""): Promise<void> {
    return this.send({ type: "exit", message: messages(text)[0] });
  }

  /**
   * Plays prompts and collects keys until `maxDigits`, a terminator, a pause, or the end of the call, and resolves with
   * what was collected so far in every case. A key past the end waits for whoever comes next. Prompts that take more than
   * five minutes are stopped and count as over: Asterisk does not tell when it could not open the last one, so nothing else
   * might ever end them.
   *
   * Rejects with `invalid` for options out of range, for a prompt that `queue` would refuse, and when another `gather` is
   * under way; with `ended` when the caller is gone before it begins.
   *
   * @example An account number, in up to three tries
   * ```ts
   * import type { Ivr } from "@externalivr/protocol";
   *
   * async function account(ivr: Ivr): Promise<string | undefined> {
   *   for (let tries = 0; tries < 3; tries++) {
   *     const { digits, reason } = await ivr.gather({ prompt: ["please-enter-your", "account"], maxDigits: 8 });
   *     if (digits || reason === "hangup") return digits;
   *   }
   * }
   * ```
   */
  gather(options: GatherOptions = {}): Promise<Gathered> {
    return quiet(this.#gather(options));
  }

  async #gather(options: GatherOptions): Promise<Gathered> {
    const { prompt = [], maxDigits = Infinity, terminators = "#", bargeIn = true, flush, signal } = options;
    const { timeout = 5000, interDigitTimeout = timeout } = options;
    let files = [prompt].flat();
    checkNumber("gather", "timeout", timeout, 0);
    checkNumber("gather", "interDigitTimeout", interDigitTimeout, 0);
    checkNumber("gather", "maxDigits", maxDigits, 1);
    if (maxDigits % 1) refuse("gather", "maxDigits", maxDigits, "a whole number");
    if (!/^[\dA-D*#]*$/.test(terminators)) refuse("gather", "terminators", terminators, "keys 0-9 * # A-D");
    for (const file of files) formatCommand({ type: "queue", file });
    if (this.signal.aborted) throw callEnded();
    if (this.#gathering) refuse("gather", "gather", options, "the only one");

    let digits = "";
    let end: Pick<Gathered, "reason" | "terminator"> | undefined;
    const outcomes: Outcome[] = [];
    const told = () => outcomes.flat().length === files.length; // which leaves out those not known yet
    const notify = () => this.notify();
    const early = (): typeof end =>
      this.signal.aborted ? { reason: "hangup" } : signal?.aborted ? { reason: "aborted" } : undefined;
    const collect = () => {
      const key = (this.take("dtmf") as { digit: Digit } | undefined)?.digit;
      if (!key) return end = early();
      if (terminators.includes(key)) end = { reason: "terminator", terminator: key };
      else if ((digits += key).length === maxDigits) end = { reason: "maxDigits" };
      return key;
    };
    const cut = bargeIn ? collect : early; // what cuts the prompts short; an abort is collected later

    while (flush && this.take("dtmf"));
    end = early();
    if (end) await turn();
    if (end) return { digits, ...end, outcomes };
    signal?.addEventListener("abort", notify);
    this.#gathering = "other";
    try {
      if (cut()) files = []; // a key that waits already
      files.forEach((file, i) => this.ask({ type: "queue", file }, ignore, ignore, (word) => outcomes[i] ??= word));
      await this.when(() => told() || cut(), 300_000);
      if (!told()) this.interrupt();

      while (!end && await this.when(collect, digits ? interDigitTimeout : timeout));
      await this.when(told);
      return { digits, reason: "timeout", ...end as object | undefined, outcomes };
    } finally {
      signal?.removeEventListener("abort", notify);
      this.#gathering = undefined;
      this.notify(); // the keys that are left are for the iterators
    }
  }

  /** While keys are gathered they are not for the iterators. */
  protected override take(wanted: "dtmf" | "other" | undefined = this.#gathering): IvrEvent | undefined {
    return super.take(wanted);
  }

  /** Sends all of them, or none when one is wrong, and brings their replies, if they have any. */
  async #all(commands: IvrCommand[]): Promise<string[]> {
    commands.forEach(formatCommand);
    if (!commands[0]) await this.send({ type: "unknown", line: "" }); // nothing, and its acknowledgement
    return Promise.all(commands.map((command) => this.send(command) as Promise<string>));
  }

  /**
   * Follows what a command does to the playlist: one with a file joins it, `S` and `I` clear it. It may tell more than once
   * what became of a prompt: the first is true.
   */
  protected override ask(
    command: IvrCommand,
    done: (reply?: unknown) => void,
    fail: (error: IvrError) => void,
    tell?: (outcome: Outcome) => void,
  ): void {
    const { type, file }: { type: string; file?: string } = command;
    if (!file && type !== "interrupt") return super.ask(command, done, fail);
    const prompt: Prompt = { file, tell };
    super.ask(command, () => {
      // `S` and `I` clear: what is still before them was skipped. A refused one has left the playlist, and clears nothing
      if (type !== "queue") this.#tell("skipped", this.#playlist.indexOf(prompt));
      done();
    }, (error) => {
      this.#playlist.splice(this.#playlist.indexOf(prompt) >>> 0, 1); // -1 is past the end
      tell?.(error.reason ? "missing" : error.code as Outcome);
      fail(error);
    });
    this.#playlist.push(prompt);
  }

  /**
   * Follows the playlist: events with a file are named as an {@linkcode Outcome} is. What should have left it before a file
   * that did, and did not say so, was skipped.
   */
  protected override seen(event: IvrEvent): unknown {
    const { type, file }: { type: string; file?: string } = event;
    if (!file && type !== "interrupted") return undefined;
    const prompt = this.#playlist.find((prompt) => prompt.file && (!file || file === prompt.file));
    if (prompt) this.#tell("skipped", this.#playlist.indexOf(prompt));
    if (prompt) this.#tell(type as Outcome, 1);
    return prompt?.tell;
  }

  /** Tells what became of the first files of the playlist. */
  #tell(outcome: Outcome, count = Infinity): void {
    for (const { tell } of this.#playlist.splice(0, count)) tell?.(outcome);
  }
}

/**
 * Takes a call from its first event to its last: makes an {@linkcode Ivr}, gives it to the handler, and closes it whatever
 * happens. Resolves with how the call ended.
 *
 * A handler that stops because the call is over is no failure: with an `ended` error of a command, with what a `fetch`
 * throws that was given {@linkcode Session.signal}, or with a command that was refused since it met the hangup. Anything
 * else that it throws ends the call, and rejects; so do options out of range (`invalid`) and a limit of the session
 * (`overflow`). One call's failure is no other's: a server catches each.
 *
 * @example A server on Deno
 * ```ts
 * import { answer, type Ivr } from "@externalivr/protocol";
 *
 * async function menu(ivr: Ivr) {
 *   await ivr.play("hello-world");
 *   await ivr.exit();
 * }
 *
 * async function serve(listener: Deno.TcpListener) {
 *   for await (const conn of listener) answer(conn, menu, { keepAlive: 20_000 }).catch(console.error);
 * }
 * ```
 */
export async function answer(
  streams: { readable: Source; writable: Sink },
  handler: (ivr: Ivr) => Promise<unknown>,
  options?: SessionOptions,
): Promise<Ending> {
  let ivr: Ivr | undefined;
  try {
    ivr = new Ivr(streams, options);
    await handler(ivr);
  } catch (error) {
    ivr ??= new Ivr(streams); // options out of range: nobody else would close
    const kind = error instanceof IvrError ? error.code : (error as Error)?.name;
    // Is it the hangup, whose `H` comes before any answer?
    const unexplained = kind === "refused" && !(error as IvrError).reason;
    if (unexplained) await Promise.race([ivr.params(), ivr["when"](ignore, GRACE)]).catch(ignore);
    if (!ivr.signal.aborted || !["refused", "ended", "AbortError"].includes(kind)) throw error;
  } finally {
    await ivr?.close();
  }
  const ending = await ivr.closed;
  if (ending.by === "error") throw ending.error;
  return ending;
}
