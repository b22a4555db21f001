// Copyright 2026 the ExternalIVR authors. MIT license.

// The same under `deno test`, `node --test` and `bun test`. Time is virtual wherever time matters.

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { Duplex, Readable, Writable } from "node:stream";
import { test } from "node:test";
import { createServer as createTlsServer } from "node:tls";
import { fileURLToPath } from "node:url";
import { inspect, isDeepStrictEqual } from "node:util";
import { Live, type LiveCall, type LiveOptions, type Over, place } from "./.ci/asterisk.ts";
import { record, type RecordingFile, recordings, untimed } from "./.ci/record.ts";
import { Asterisk, type CallerAction, type Dialplan, type Note, parseDialplan } from "./examples/asterisk.ts";
import { webSocketStreams } from "./examples/edge.ts";
import { menu, nodeStreams } from "./examples/menu.ts";
import { tap, type Tapped } from "./examples/tap.ts";
import * as say from "./examples/say.ts";
import {
  type Call,
  CallError,
  dial,
  type DialOptions,
  dialStreams,
  type Recording,
  replay,
  type Streams,
  VirtualClock,
} from "./examples/testing.ts";
import {
  answer,
  type Ending,
  formatCommand,
  formatEvent,
  type Gathered,
  type GatherOptions,
  Ivr,
  type IvrCommand,
  IvrError,
  type IvrErrorCode,
  type IvrEvent,
  lines,
  type Outcome,
  parseCommand,
  parseEvent,
  parseVariables,
  type SessionOptions,
} from "./mod.ts";

// ---------------------------------------------------------------------------------------------------------
// Generators: random choices that can be repeated
// ---------------------------------------------------------------------------------------------------------

const SEED = Number(process.env["SEED"] ?? Date.now() % 1_000_000_007);
console.log(`SEED=${SEED}`);

/** Random choices that can be repeated: SEED=… runs the same again. */
class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** A whole number below a bound (mulberry32). */
  below(bound: number): number {
    let z = this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) % bound;
  }

  of<T>(choices: ArrayLike<T>): T {
    return choices[this.below(choices.length)]!;
  }

  text(alphabet: ArrayLike<string>, most: number): string {
    return Array.from({ length: this.below(most + 1) }, () => this.of(alphabet)).join("");
  }
}

/** Runs a property many times, and names the seed of a failure. */
async function forAll(runs: number, property: (random: Random) => void | Promise<void>): Promise<void> {
  for (let run = 0; run < runs; run++) {
    try {
      await property(new Random(SEED + run));
    } catch (error) {
      console.error(`failed with SEED=${SEED + run}`);
      throw error;
    }
  }
}

/** Letters that have a meaning somewhere, and some that have none. */
const AWKWARD = [...'ab,=; DHX0#*é€𝄞"\\()\t\r\n\0\x1f\x7f', "\ud800", " ", "autoclear", "EIVR_ACK_1="];

// ---------------------------------------------------------------------------------------------------------
// What every section uses: bytes, errors, events, a host to play, a time of its own
// ---------------------------------------------------------------------------------------------------------

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);

/** A text in chunks of so many bytes. */
function cut(text: string, size: number): Uint8Array[] {
  const bytes = utf8(text);
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.subarray(i * size, (i + 1) * size));
}

/** A stream of these chunks. */
function streamOf(...chunks: Uint8Array[]): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

const never = () => new Promise<never>(() => {});

/** Streams with no more than a session uses, which never do anything unless told otherwise. */
const bare = (
  { read = never, write = never, close = never, cancel = never, abort = close }: Record<
    string,
    () => Promise<never | void>
  >,
) => ({
  readable: { getReader: () => ({ read: read as typeof never, cancel, releaseLock: () => {} }) },
  writable: { getWriter: () => ({ write, close, abort }) },
});

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) found.push(item);
  return found;
}

/** Takes the next event, as a loop does that is left with it. */
async function next(session: AsyncIterable<IvrEvent>): Promise<IvrEvent | undefined> {
  for await (const event of session) return event;
  return undefined;
}

/** An event in a word: a key as itself, others by their type. */
const brief = (event: IvrEvent | undefined) => event?.type === "dtmf" ? event.digit : event?.type;

/** What a gather resolves with. A key as the reason is the terminator. */
const collected = (digits: string, reason: Gathered["reason"] | "#" | "D", ...outcomes: Outcome[]): Gathered =>
  reason === "#" || reason === "D"
    ? { digits, reason: "terminator", terminator: reason, outcomes }
    : { digits, reason, outcomes };

/** A turn of the event loop, or so many milliseconds. */
const pause = (ms = 0) => new Promise<void>((resolve) => setTimeout(resolve, ms));

function code(expected: IvrErrorCode): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof IvrError && error instanceof Error);
    assert.equal(error.code, expected, error.message);
    assert.equal(error.name, "IvrError");
    return true;
  };
}

/** An `invalid` error that has the field as a property and in its message, and what was tried. */
function refuses(field: string, doing: string): (error: unknown) => boolean {
  return (error) => {
    assert.ok(code("invalid")(error));
    const { message } = error as Error;
    assert.equal((error as IvrError).field, field, message);
    assert.ok(message.startsWith(`Cannot ${doing}: ${field} `), message);
    return true;
  };
}

function assertNear(actual: number, expected: number, within: number, name = ""): void {
  assert.ok(Math.abs(actual - expected) < within, `${name} ${actual}, not ${expected}`);
}

/** What a serializer takes is one line and reads back as it was; what it does not take is `invalid`. */
function assertRoundTrip<T>(value: T, format: (value: T) => string, parse: (line: string) => T): void {
  let line: string;
  try {
    line = format(value);
  } catch (error) {
    return void assert.ok(code("invalid")(error));
  }
  assert.match(line, /^[^\r\n\0]*\n$/);
  assert.deepEqual(parse(line), value);
}

/** How Asterisk answers a question for a variable that nobody set: `G,name` with `G,1,name=`. */
const unset = (question: string) => question.replace("G,", "G,1,") + "=";

/** Plays the host of a session, at the other ends of its streams: says just what the test says. */
function playHost(options?: SessionOptions) {
  const room = { highWaterMark: 1000 };
  const events = new TransformStream<Uint8Array, Uint8Array>(undefined, undefined, room);
  const commands = new TransformStream<Uint8Array, Uint8Array>(undefined, undefined, room);
  const session = new Ivr({ readable: events.readable, writable: commands.writable }, options);
  const writer = events.writable.getWriter();
  const sent = lines(commands.readable);
  const write = (text: string | Uint8Array) =>
    void writer.write(typeof text === "string" ? utf8(text) : text).catch(() => {});
  async function hears(): Promise<string> {
    for (;;) {
      const { value, done } = await sent.next();
      if (done) return "(end)";
      if (value) return value;
    }
  }
  async function hearsAll(reply: (command: string) => string[] = () => []): Promise<string[]> {
    const heard: string[] = [];
    for (let command; (command = await hears()) !== "(end)"; heard.push(command)) say(...reply(command));
    return heard;
  }
  const say = (...texts: string[]) => texts.length && write(texts.join("\n") + "\n");
  return {
    session,
    /** Says lines. */
    say,
    /** Says a text without a newline behind it. */
    write,
    /** Ends the stream of events. */
    end: () => void writer.close().catch(() => {}),
    /** Breaks the stream of events. */
    breaks: (error: Error) => void writer.abort(error).catch(() => {}),
    /** The next command that is no wake-up. */
    hears,
    /** Every command until the end, each with a reply of so many lines. */
    hearsAll,
    /** Acknowledges a command whose question comes next. */
    acknowledges: async () => say(unset(await hears())),
    async [Symbol.asyncDispose]() {
      const closing = session.close();
      await hearsAll().catch(() => {}); // the session failed, and broke off
      await closing;
    },
  };
}

/** Runs code in virtual time, which passes whenever nothing else happens, and leaves no timer behind. */
async function inTime(
  body: (seconds: () => number) => Promise<void>,
  clock: VirtualClock = new VirtualClock(),
): Promise<void> {
  let done = false;
  // What nobody awaits rejects a turn later
  const running = clock.run(() => body(() => clock.now() / 1e6).then(() => pause()));
  running.catch(() => {}).then(() => done = true);
  for (await clock.settle(); !done; await clock.settle()) {
    assert.ok(clock.pending && clock.now() < 3600e6, "nothing more can happen");
    await clock.step();
  }
  await running;
  assert.equal(clock.pending, 0, "no timer is left");
}

/** The files that exist, and their seconds. */
const SOUNDS = { short: 0.5, medium: 2, long: 5, beep: 0.2 };

/** Holds a call to the stand-in to its end, in virtual time, with a caller who acts by themselves; no timer is left. */
async function inCall(
  handler: (ivr: Ivr, call: Call) => unknown,
  { caller = [], ...options }: DialOptions & { caller?: CallerAction[] } = {},
): Promise<void> {
  const call: Call = dial((ivr) => handler(ivr, call), { sounds: SOUNDS, ...options });
  call.plan(caller);
  await call.over();
  assert.equal(call.clock.pending, 0, "no timer is left");
}

// ---------------------------------------------------------------------------------------------------------
// 1. Events: what Asterisk says, a line each, both ways
//
// Parsing never fails and loses nothing. Formatting refuses what would not be read as it was written.
// ---------------------------------------------------------------------------------------------------------

const timestamp = 1795372496;

/** Each line as Asterisk writes it, and what it says: both directions. */
const EVENTS: [line: string, event: IvrEvent][] = [
  // The caller pressed a key
  ...[..."0123456789*#ABCD"].map((digit): [string, IvrEvent] => [
    `${digit},1795372496`,
    { type: "dtmf", timestamp, digit: digit as "0" },
  ]),
  // A file left the playlist: it was played, interrupted (by name since Asterisk 1.8), or dropped before its turn
  ["F,1795372496,digits/1", { type: "finished", timestamp, file: "digits/1" }],
  ["F,1795372496, a,b=c ", { type: "finished", timestamp, file: " a,b=c " }],
  ["T,1795372496,beep", { type: "interrupted", timestamp, file: "beep" }],
  ["T,1795372496", { type: "interrupted", timestamp }],
  ["D,1795372496,vm-goodbye", { type: "dropped", timestamp, file: "vm-goodbye" }],
  // A command was refused: there is no such file, the channel cannot be answered, or it is not
  ["Z,1795372496,nosuch", { type: "failed", timestamp, reason: "nosuch" }],
  ["Z,1795372496,ANSWER_FAILURE", { type: "failed", timestamp, reason: "ANSWER_FAILURE" }],
  ["Z,1795372496", { type: "failed", timestamp }],
  // The answers to P and G: of what stands between commas only P's is cut, since values hold commas
  ["P,1795372496,ivr://[::1]:2949,arg1,arg two,", {
    type: "params",
    timestamp,
    params: ["ivr://[::1]:2949", "arg1", "arg two", ""],
  }],
  ["G,1795372496,FOO=bar,COMMA=a,b=c,NOPE=", { type: "variables", timestamp, data: "FOO=bar,COMMA=a,b=c,NOPE=" }],
  // The caller is gone and the call goes on (option i), the caller is gone, the call went on in the dialplan
  ["I,1795372496,HANGUP", { type: "inform", timestamp, message: "HANGUP" }],
  ["H,1795372496", { type: "hangup", timestamp }],
  ["E,1795372496", { type: "exit", timestamp }],
  // Times are as wide as ten characters at least, and negative from 2038
  ["H,         1", { type: "hangup", timestamp: 1 }],
  ["H,         0", { type: "hangup", timestamp: 0 }],
  ["H,-2147483648", { type: "hangup", timestamp: -2147483648 }],
  ["1,        -1", { type: "dtmf", timestamp: -1, digit: "1" }],
  ["H,9007199254740991", { type: "hangup", timestamp: 9007199254740991 }],
  ["F,2147483647,é€", { type: "finished", timestamp: 2147483647, file: "é€" }],
];

/** Lines that mean nothing, and come back as they are. */
const STRANGE_EVENTS = [
  ...["", ",", "1", "1,"], // too short
  ...["1,x", "1,1e3", "1,0x10", "1, ", "1,- 1", "1,--1", "1,1 ", "1,17/95"], // no time
  ...[`1,${"9".repeat(400)}`, "1,9007199254740993"], // a time that no number holds
  ...["1,1795372496,data", "H,1795372496,data", "E,1795372496,data"], // data where there is none
  ...["F,1795372496", "F,1795372496,", "D,1795372496,", "G,1795372496", "P,1795372496", "I,1795372496"], // no data
  ...["Q,1795372496", "f,1795372496,beep", "é,1795372496", "𝄞,1795372496"], // no tag
  ...["12,1795372496", " 1,1795372496", "1;1795372496"], // a tag and more
];

const circular: unknown[] = [];
circular.push(circular);

/** Values of every kind that is no text; of some of them no text can be made. */
const STRANGE_VALUES: unknown[] = [1n, Symbol("s"), null, circular, Object.create(null), () => {}, {
  toString: () => {
    throw new Error("no");
  },
}, { toString: () => "a\nH,b", toJSON: () => "a" }];

/** Types that there are not. */
const STRANGE_TYPES: unknown[] = ["", "beep", undefined, 5, null, "constructor", "toString", "__proto__"];

/** What an event cannot be: the field at fault, the type, and values of that field. */
const REFUSED_EVENTS: [field: string, type: string, values: unknown[]][] = [
  ["digit", "dtmf", ["E", "H", "12", ""]],
  ["timestamp", "hangup", [1.5, NaN, Infinity, undefined]],
  ["timestamp", "exit", STRANGE_VALUES],
  ["file", "finished", ["", undefined, ...STRANGE_VALUES]],
  ["file", "dropped", ["a\nb"]],
  ["file", "interrupted", ["a\rb", ""]],
  ["reason", "failed", ["a\0b"]],
  ["params", "params", [[], ["a,b"]]],
  ["data", "variables", ["X=\ud800"]],
  ["message", "inform", [""]],
  ["line", "unknown", ["H,1795372496", "Q\n", undefined]],
];

test("events: each line of the golden table is read as its event, with every line break, and written from it", () => {
  for (const [line, event] of EVENTS) {
    for (const end of ["", "\n", "\r\n"]) assert.deepEqual(parseEvent(line + end), event);
    assert.equal(formatEvent(event), line + "\n");
  }
});

test("events: a line that is not understood is unknown, and comes back whole", () => {
  for (const line of STRANGE_EVENTS) {
    for (const end of ["", "\n", "\r\n"]) assert.deepEqual(parseEvent(line + end), { type: "unknown", line });
    assert.equal(formatEvent({ type: "unknown", line }), line + "\n");
  }
});

test("events: what no line can carry is refused, and the field is named", () => {
  for (const [field, type, values] of REFUSED_EVENTS) {
    for (const value of values) {
      const event = { timestamp, type, [field]: value } as unknown as IvrEvent;
      assert.throws(() => formatEvent(event), refuses(field, `send ${type}`));
    }
  }
});

test("events: a type that there is not is refused by its name", () => {
  for (const type of STRANGE_TYPES) {
    assert.throws(() => formatEvent({ type, timestamp } as unknown as IvrEvent), refuses("type", `send ${type}`));
  }
});

test("events: fields may stand in any order, and among others", () => {
  assert.equal(formatEvent({ file: undefined, at: 5, timestamp, type: "interrupted" } as IvrEvent), "T,1795372496\n");
});

test("events: parse undoes format, for whatever format takes", () =>
  forAll(2000, (random) => {
    const text = () => random.text(AWKWARD, 8);
    const timestamp = random.of([0, 1, -1, 1795372496, -2147483648, 2147483647, 1.5]);
    const event = random.of<() => unknown>([
      () => ({ type: "dtmf", timestamp, digit: text() }),
      () => ({ type: random.of(["finished", "dropped", "interrupted"]), timestamp, file: text() }),
      () => ({ type: "failed", timestamp, reason: text() }),
      () => ({ type: "params", timestamp, params: Array.from({ length: random.below(4) }, text) }),
      () => ({ type: "variables", timestamp, data: text() }),
      () => ({ type: "inform", timestamp, message: text() }),
      () => ({ type: "unknown", line: text() }),
    ])() as IvrEvent;
    assertRoundTrip(event, formatEvent, parseEvent);
  }));

test("events: any text can be read, and what is not understood of it is kept whole", () =>
  forAll(2000, (random) => {
    const line = random.text([...AWKWARD, "1795372496", "\n", "G,", "T,", "D,"], 12);
    const event = parseEvent(line);
    if (event.type === "unknown") assert.equal(event.line, line.replace(/\r?\n$/, ""));
    else assertRoundTrip(event, formatEvent, parseEvent);
  }));

// ---------------------------------------------------------------------------------------------------------
// 2. Commands: what Asterisk is asked, a line each, both ways
//
// Read as Asterisk reads them, which ignores what it does not understand without a word; so that is never written.
// ---------------------------------------------------------------------------------------------------------

/** Each command as it goes out, and what it asks: both directions. */
const COMMANDS: [line: string, command: IvrCommand][] = [
  // The playlist: instead of it, at its end, without it
  ["S,digits/1", { type: "play", file: "digits/1" }],
  ["S, a,b", { type: "play", file: " a,b" }],
  ["A,x", { type: "queue", file: "x" }],
  ["I,interrupt", { type: "interrupt" }],
  // Keys toward the caller, so many milliseconds apart, each so long
  ["D,0123456789*#ABCD", { type: "dtmf", digits: "0123456789*#ABCD" }],
  ["D,1w2WabcdfF,0", { type: "dtmf", digits: "1w2WabcdfF", interval: 0 }],
  ["D,1,200", { type: "dtmf", digits: "1", interval: 200 }],
  ["D,1,200,100", { type: "dtmf", digits: "1", interval: 200, duration: 100 }],
  ["D,1,,100", { type: "dtmf", digits: "1", duration: 100 }],
  ["D,1,0,0", { type: "dtmf", digits: "1", interval: 0, duration: 0 }],
  // Whether a key clears the playlist by itself
  ["O,autoclear", { type: "autoclear", on: true }],
  ["O,noautoclear", { type: "autoclear", on: false }],
  // Variables: blanks belong to names, equals signs to values
  ["V,A=1", { type: "set", variables: { A: "1" } }],
  ["V,A=,B=x=y, D=2,CALLERID(name)=Bob B,__X=é", {
    type: "set",
    variables: { A: "", B: "x=y", " D": "2", "CALLERID(name)": "Bob B", __X: "é" },
  }],
  ["G,A", { type: "get", names: ["A"] }],
  ["G,A, D,CALLERID(num)", { type: "get", names: ["A", " D", "CALLERID(num)"] }],
  // The arguments, the log, the channel answered, and the two ends of a call
  ["P,params", { type: "params" }],
  ["L,a line, with commas", { type: "log", message: "a line, with commas" }],
  ["T,answer", { type: "answer" }],
  ["H,bye", { type: "hangup", message: "bye" }],
  ["E,on", { type: "exit", message: "on" }],
];

/** What Asterisk reads in other shapes than are written. */
const OTHER_COMMANDS: [line: string, command: IvrCommand][] = [
  ["S;short", { type: "play", file: "short" }],
  ["Sxshort", { type: "play", file: "short" }],
  ["A,sho\0rt", { type: "queue", file: "sho" }],
  ["P,,", { type: "params" }],
  ["I,x", { type: "interrupt" }],
  ["O,AutoClear", { type: "autoclear", on: true }],
  ["O,NOAUTOCLEAR", { type: "autoclear", on: false }],
  ["D,1,,", { type: "dtmf", digits: "1" }],
  ["V,A=1,B,C=x=y, D=2", { type: "set", variables: { A: "1", B: "", C: "x=y", " D": "2" } }],
  ["X,done", { type: "exit", message: "done" }],
];

/** What Asterisk ignores. */
const IGNORED_COMMANDS = [
  ...[..."SAIDOVGPLHEXT"].flatMap((letter) => [letter, letter + ",", letter + ", \t "]), // nothing asked
  ...["", " ", "s,short", "Q,foo", "   P,params", "é,x"], // no letter
  ...["O,bogus", "D,12x", "D,1,-5", "D,1,2,3,4"], // nothing that can be done
  ...["\0S,short", "E,\0bye"], // ended too early
];

/** Texts that no command can carry: blanks at the end are trimmed, a NUL ends it, half a character arrives as another. */
const REFUSED_TEXTS = ["", " ", "\t", "a ", "a\n", "a\nb", "a\rb", "a\0b", "a\x1f", "\ud83d", undefined, 5];

/** As long as the file of a command can be. */
const LONGEST = ["x".repeat(1020), "é".repeat(510)];

/** What a command cannot be: the field at fault, the type, and values of that field. */
const REFUSED_COMMANDS: [field: string, type: string, values: unknown[]][] = [
  ["file", "play", [...REFUSED_TEXTS, ...STRANGE_VALUES, ...LONGEST.map((file) => file + "x")]],
  ["file", "queue", REFUSED_TEXTS],
  ["message", "log", [...REFUSED_TEXTS, ...STRANGE_VALUES]],
  ["message", "hangup", [""]],
  ["message", "exit", ["a\nH,b"]],
  ["digits", "dtmf", ["", "12E", "1,2", "1 ", "1".repeat(1100), ...STRANGE_VALUES]],
  ["interval", "dtmf", [-1, 1.5, "5", ...STRANGE_VALUES]],
  ["duration", "dtmf", [NaN, Infinity, null]],
  ["on", "autoclear", ["yes"]],
  ["variables", "set", [{}, { A: "1,2" }, { A: "1\n2" }, { A: "1 " }, { A: "1 ", B: "2" }, { A: 1 }]],
  ["variables", "set", [{ "": "1" }, { A: "1", "": "2" }, { "A,B": "1" }, { "A=B": "1" }]],
  ["names", "get", [[], [""], ["A", ""], ["", "A"], ["A", "", "B"], ["A,B"], ["A=B"], Array(200).fill("NAME1")]],
  ["names", "get", [["\u2028", ""], ...STRANGE_VALUES]],
  ["variables", "set", STRANGE_VALUES],
  ["line", "unknown", ["H,bye", "Q\nH,bye", "Q".repeat(1023), undefined]],
];

/** The data of a `G`, the names that were asked, and their values. */
const VARIABLES: [data: string, names: string[], values: Record<string, string>][] = [
  ["A=1", ["A"], { A: "1" }],
  ["A=", ["A"], { A: "" }],
  ["A=1,2=3,B=", ["A"], { A: "1,2=3,B=" }],
  ["A=1,undefined=2", ["A"], { A: "1,undefined=2" }],
  ["FOO=bar,COMMA=a,b=c,EXTEN=", ["FOO", "COMMA", "EXTEN"], { FOO: "bar", COMMA: "a,b=c", EXTEN: "" }],
  ["A=1,B=,C=x=y,D=, D=2", ["A", "B", "C", "D", " D"], { A: "1", B: "", C: "x=y", D: "", " D": "2" }],
  ["A=1,A=1", ["A", "A"], { A: "1" }],
  ["A=1\0x,B=\0=,2", ["A", "B"], { A: "1\0x", B: "\0=,2" }],
  ["A=1,B=2,C=cu", ["A", "B", "C", "D"], { A: "1", B: "2", C: "cu" }],
  ["X=1", ["A"], {}],
  ["", ["A"], {}],
  ["A=1", [], {}],
  ["a.*=1,(=2", ["a.*", "("], { "a.*": "1", "(": "2" }],
  ["__proto__=1", ["__proto__"], Object.fromEntries([["__proto__", "1"]])],
];

test("commands: each line of the golden table is read as its command, trimmed as by Asterisk, and written from it", () => {
  for (const [line, command] of COMMANDS) {
    for (const end of ["", "\n", "\r\n", " ", " \t\r\n", "\x1f\x01\n", "\0", "\0more\n"]) {
      assert.deepEqual(parseCommand(line + end), command);
    }
    assert.equal(formatCommand(command), line + "\n");
  }
});

test("commands: what Asterisk reads in other shapes is read so too", () => {
  for (const [line, command] of OTHER_COMMANDS) assert.deepEqual(parseCommand(line), command);
});

test("commands: what Asterisk ignores is unknown, with its line", () => {
  for (const line of IGNORED_COMMANDS) {
    assert.deepEqual(parseCommand(line), { type: "unknown", line });
    assert.deepEqual(parseCommand(line + "\n"), { type: "unknown", line });
  }
});

test("commands: the payload is never empty", () => {
  assert.equal(formatCommand({ type: "hangup" }), "H,hangup\n");
  assert.equal(formatCommand({ type: "exit" }), "E,exit\n");
  assert.equal(formatCommand({ type: "exit", message: undefined }), "E,exit\n");
  assert.deepEqual(parseCommand(formatCommand({ type: "hangup" })), { type: "hangup", message: "hangup" });
});

test("commands: a line has at most 1022 bytes, and a newline", () => {
  assert.equal(utf8(formatCommand({ type: "dtmf", digits: "1".repeat(1020) })).length, 1023);
  for (const file of LONGEST) assert.equal(utf8(formatCommand({ type: "play", file })).length, 1023);
});

test("commands: what no line can carry is refused, and the field is named", () => {
  for (const [field, type, values] of REFUSED_COMMANDS) {
    for (const value of values) {
      const command = { digits: "1", type, [field]: value } as unknown as IvrCommand;
      assert.throws(() => formatCommand(command), refuses(field, `send ${type}`));
    }
  }
});

test("commands: a type that there is not is refused by its name", () => {
  for (const type of STRANGE_TYPES) {
    assert.throws(() => formatCommand({ type } as unknown as IvrCommand), refuses("type", `send ${type}`));
  }
});

test("commands: fields may stand in any order, and among others", () => {
  const command = { at: 5, duration: 80, digits: "1", interval: undefined, type: "dtmf" } as const;
  assert.equal(formatCommand(command), "D,1,,80\n");
  assert.equal(formatCommand({ type: "play", file: "a", S: "b" } as IvrCommand), "S,a\n");
});

test("commands: a refusal shows the value without control characters, and not all of a long one", () => {
  const file = "\x1b[2J\x9b\u202e\n" + "x".repeat(5000);
  assert.throws(() => formatCommand({ type: "play", file }), ({ message }) => {
    assert.doesNotMatch(message, /[\p{Cc}\p{Cf}]/u);
    return message.length < 400;
  });
});

test("commands: parse undoes format, for whatever format takes", () =>
  forAll(2000, (random) => {
    const text = () => random.text(AWKWARD, 6);
    const many = <T>(some: () => T) => Array.from({ length: random.below(4) }, some);
    const digits = random.text([..."0123456789*#ABCDabcdwWfF,e"], 5);
    const interval = random.of([undefined, 0, 1, 250, 60000, -1, 0.5]);
    const command = random.of<() => unknown>([
      () => ({ type: random.of(["play", "queue"]), file: text() }),
      () => ({ type: "dtmf", digits, ...interval !== undefined && { interval } }),
      () => ({ type: "autoclear", on: random.of([true, false]) }),
      () => ({ type: "set", variables: Object.fromEntries(many(() => [text(), text()])) }),
      () => ({ type: "get", names: many(text) }),
      () => ({ type: random.of(["log", "hangup", "exit"]), message: text() }),
      () => ({ type: random.of(["interrupt", "answer", "params"]) }),
      () => ({ type: "unknown", line: text() }),
    ])() as IvrCommand;
    assertRoundTrip(command, formatCommand, parseCommand);
  }));

test("commands: any text can be read, and what is ignored of it is kept whole", () =>
  forAll(2000, (random) => {
    const line = random.text([...AWKWARD, ..."SAITDOVGPLHEX"], 8);
    const command = parseCommand(line);
    if (command.type === "unknown") assert.equal(command.line, line.replace(/\r?\n$/, ""));
    else assertRoundTrip(command, formatCommand, parseCommand);
  }));

test("variables: commas, equals signs and strange names come back whole, and what was cut away is absent", () => {
  for (const [data, names, values] of VARIABLES) assert.deepEqual(parseVariables(data, names), values);
});

// ---------------------------------------------------------------------------------------------------------
// 3. Lines: bytes to lines
//
// However the bytes were cut, whatever they are, the lines are the same; and one line has a bound.
// ---------------------------------------------------------------------------------------------------------

/** Long lines, and how long one may be: the lines, `overflow` where they end with a longer one. */
const BOUNDS: [text: string, maxBuffer: number | undefined, found: string[], end?: "overflow"][] = [
  ["12345\n123\n12345", 5, ["12345", "123", "12345"]],
  ["1\n2\n123456\n3\n", 5, ["1", "2"], "overflow"],
  ["1234\r\nx", 5, ["1234", "x"]],
  ["1\n1234\r\nx", 4, ["1"], "overflow"], // a CR counts, wherever the bytes are cut
  ["x".repeat(2 ** 20), undefined, ["x".repeat(2 ** 20)]],
  ["x".repeat(2 ** 20 + 1), undefined, [], "overflow"],
];

test("lines: they are the same wherever the bytes are cut, into three or each by itself", async () => {
  const text = "1,1\nF,1,é€𝄞\r\n\n\r\nG,1,X=\ufeff\nlast";
  const bytes = utf8(text);
  const expected = ["1,1", "F,1,é€𝄞", "", "", "G,1,X=\ufeff", "last"];
  for (let a = 0; a <= bytes.length; a++) {
    for (let b = a; b <= bytes.length; b++) {
      const chunks = [bytes.subarray(0, a), bytes.subarray(a, b), bytes.subarray(b)];
      assert.deepEqual(await all(lines(streamOf(...chunks))), expected);
    }
  }
  assert.deepEqual(await all(lines(streamOf(...cut(text, 1)))), expected);
});

test("lines: a byte order mark is data, an empty stream has no line, a newline at the end adds none", async () => {
  assert.deepEqual(await all(lines(streamOf(utf8("\ufeffa\n")))), ["\ufeffa"]);
  assert.deepEqual(await all(lines(streamOf())), []);
  assert.deepEqual(await all(lines(streamOf(utf8("\n")))), [""]);
});

test("lines: an end that comes with a chunk, as readers into a buffer give, is one", async () => {
  for (const [first, last] of [["1,1\nH,1", ""], ["1,1\nH", ",1\n"]] as const) {
    const ends = () => {
      const chunks = [{ done: false, value: utf8(first) }, { done: true, value: utf8(last) }];
      const reader = {
        read: () => Promise.resolve(chunks.shift()!),
        cancel: () => Promise.resolve(),
        releaseLock: () => {},
      };
      return { getReader: () => reader };
    };
    assert.deepEqual(await all(lines(ends())), ["1,1", "H,1"]);
    assert.deepEqual(await new Ivr({ readable: ends(), writable: new WritableStream() }).closed, { by: "caller" });
  }
});

test("lines: malformed bytes become U+FFFD and never an error, as if they had come at once", () =>
  forAll(200, async (random) => {
    const bytes = Uint8Array.from(
      { length: 1 + random.below(40) },
      () => random.of([0x0a, 0x0d, 0x41, 0xc3, 0xa9, 0xe2, 0x82, 0xff, random.below(256)]),
    );
    const chunks: Uint8Array[] = [];
    for (let at = 0; at < bytes.length;) chunks.push(bytes.subarray(at, at += 1 + random.below(5)));
    assert.deepEqual(await all(lines(streamOf(...chunks))), await all(lines(streamOf(bytes))));
  }));

test("lines: one may be as long as maxBuffer, and those before a longer one come first", async () => {
  for (const [text, maxBuffer, expected, end] of BOUNDS) {
    for (const size of text.length < 99 ? [1, 2, 3, 4, 5, 6, 1000] : [text.length]) {
      const found: string[] = [];
      const reading = (async () => {
        for await (const line of lines(streamOf(...cut(text, size)), { maxBuffer })) found.push(line);
      })();
      await (end ? assert.rejects(reading, code(end)) : reading);
      assert.deepEqual(found, expected);
    }
  }
});

test("lines: one that does not end is too long as soon as it is", async () => {
  const endless = new ReadableStream<Uint8Array>({ start: (controller) => controller.enqueue(utf8("1234567")) });
  await assert.rejects(all(lines(endless, { maxBuffer: 5 })), code("overflow"));
});

test("lines: a bound that is no number from 1 is refused", async () => {
  for (const maxBuffer of [0, -1, NaN, "5"]) {
    await assert.rejects(all(lines(streamOf(), { maxBuffer: maxBuffer as number })), refuses("maxBuffer", "read"));
  }
});

test("lines: leaving the loop cancels the stream", async () => {
  let cancelled = false;
  const endless = new ReadableStream<Uint8Array>({
    pull: (controller) => controller.enqueue(utf8("a\n")),
    cancel: () => void (cancelled = true),
  });
  for await (const line of lines(endless)) if (line === "a") break;
  assert.ok(cancelled);
});

test("lines: that a source cannot be given up any more is nobody's error", async () => {
  const chunks = [{ done: false, value: utf8("a\nb") }, { done: true }];
  const read = () => Promise.resolve(chunks.shift()!) as Promise<never>;
  const cancel = () => Promise.reject(new Error("no longer there"));
  assert.deepEqual(await all(lines(bare({ read, cancel }).readable)), ["a", "b"]);
});

// ---------------------------------------------------------------------------------------------------------
// 4. Session: against a host that says just what the test says
//
// Every event reaches somebody, once. Every command is settled by its answer, or by the end of the call, which is told
// as it was. What waits has a bound, and no call holds up another.
// ---------------------------------------------------------------------------------------------------------

// Events

test("session: every event reaches the iterator, once and in order", async () => {
  await using host = playHost();
  host.say(...EVENTS.map(([line]) => line), ...STRANGE_EVENTS);
  host.end();
  const strange = STRANGE_EVENTS.map((line) => ({ type: "unknown", line }));
  assert.deepEqual(await all(host.session), [...EVENTS.map(([, event]) => event), ...strange]);
  assert.deepEqual(await all(host.session), []);
});

test("session: two waits get an event each, and a loop that was left swallows none", async () => {
  await using host = playHost();
  const [left, stays] = [host.session[Symbol.asyncIterator](), host.session[Symbol.asyncIterator]()];
  const waits = [left.next(), stays.next(), left.next(), stays.next()];
  await left.return!();
  assert.equal((await waits[0])!.done, true); // at once
  host.say("1,1", "2,1", "3,1");
  const results = (await Promise.all(waits)).map(({ done, value }) => done ? "done" : brief(value!));
  assert.deepEqual(results, ["done", "1", "done", "2"]);
  assert.deepEqual(await next(host.session), { type: "dtmf", timestamp: 1, digit: "3" });
  host.say("4,1");
  assert.deepEqual((await stays.next()).value, { type: "dtmf", timestamp: 1, digit: "4" });
  host.say("5,1");
  assert.equal((await left.next()).done, true);
});

test("session: of two waits of one loop the older has the older event, whoever runs between", async () => {
  await using host = playHost();
  const loop = host.session[Symbol.asyncIterator]();
  const waits = [loop.next()];
  const got = host.session.send({ type: "get", names: ["A"] }).then(() => waits.push(loop.next()));
  host.say("G,1,A=", "1,1", "2,1");
  await got;
  assert.deepEqual((await Promise.all(waits)).map(({ value }) => brief(value!)), ["1", "2"]);
});

test("session: a wait that nobody looks at is no unhandled rejection", async () => {
  await using host = playHost({ maxBuffer: 50 });
  host.session[Symbol.asyncIterator]().next();
  host.write("x".repeat(100));
  assert.equal((await host.session.closed).by, "error");
  await pause(); // the loop ends a turn later
});

// Commands, and what answers them

/** What rejects before a byte is sent: the field at fault, what was tried, and the call. */
const INVALID: [field: string, doing: string, call: (ivr: Ivr) => Promise<unknown>][] = [
  ["file", "send play", (ivr) => ivr.play("")],
  ["file", "send queue", (ivr) => ivr.queue("a\nH,b")],
  ["variables", "send set", (ivr) => ivr.set({ A: "1,2" })],
  ["variables", "send set", (ivr) => ivr.set({})],
  ["variables", "send set", (ivr) => ivr.set({ A: "x".repeat(1100) })],
  ["names", "send get", (ivr) => ivr.get("GOOD", "BAD=1")],
  ["digits", "send dtmf", (ivr) => ivr.sendDtmf("12x")],
  ["interval", "send dtmf", (ivr) => ivr.sendDtmf("1", { interval: -1 })],
  ["on", "send autoclear", (ivr) => ivr.autoclear("yes" as never)],
  ["line", "send unknown", (ivr) => ivr.send({ type: "unknown", line: "H,x" })],
  ["message", "send hangup", (ivr) => ivr.send({ type: "hangup", message: "a\nb" })],
  ["type", "send beep", (ivr) => ivr.send({ type: "beep" } as never)],
  ["maxDigits", "gather", (ivr) => ivr.gather({ maxDigits: 0 })],
  ["maxDigits", "gather", (ivr) => ivr.gather({ maxDigits: 1.5 })],
  ["terminators", "gather", (ivr) => ivr.gather({ terminators: "#x" })],
  ["timeout", "gather", (ivr) => ivr.gather({ timeout: -1 })],
  ["timeout", "gather", (ivr) => ivr.gather({ timeout: NaN })],
  ["timeout", "gather", (ivr) => ivr.gather({ timeout: "5" as never })],
  ["interDigitTimeout", "gather", (ivr) => ivr.gather({ interDigitTimeout: -1 })],
  ["file", "send queue", (ivr) => ivr.gather({ prompt: ["good", "bad\n"] })],
];

test("session: bad input rejects before a byte is sent, and nobody has to look", async () => {
  await using host = playHost();
  for (const [field, doing, call] of INVALID) {
    call(host.session); // nobody looks
    await assert.rejects(call(host.session), refuses(field, doing));
  }
  host.session.set({ GOOD: "1" });
  assert.equal(await host.hears(), "V,GOOD=1");
});

test("session: a command is acknowledged by a G behind it, of a name that is unique and never seen", async () => {
  await using host = playHost();
  const done = [host.session.set({ A: "1" }), host.session.log("x"), host.session.interrupt()];
  const questions: string[] = [];
  for (const command of ["V,A=1", "L,x", "I,interrupt"]) {
    assert.equal(await host.hears(), command);
    questions.push(await host.hears());
    assert.match(questions.at(-1)!, /^G,[^,=]+$/);
  }
  assert.equal(new Set(questions).size, 3);
  host.say(...questions.map(unset));
  await Promise.all(done);
  host.say("1,1");
  assert.equal(brief(await next(host.session)), "1");
});

test("session: a Z belongs to the command whose acknowledgement comes next", async () => {
  await using host = playHost();
  const { session } = host;
  const results = Promise.allSettled([
    session.set({ A: "1" }),
    session.queue("nosuch"),
    session.autoclear(true),
    session.play("good"),
    session.send({ type: "queue", file: "nosuch2" }),
    session.answer(),
  ]);
  const acks: string[] = [];
  while (acks.length < 6) {
    const command = await host.hears();
    if (command.startsWith("G,")) acks.push(unset(command));
  }
  const failures = [[], ["Z,1,nosuch"], ["Z,1"], [], ["Z,1,nosuch2"], ["Z,1,ANSWER_FAILURE"]];
  host.say(...failures.flatMap((failure, i) => [...failure, acks[i]!]), "F,1,good");
  const outcomes = (await results).map((result) => result.status === "fulfilled" ? result.value : result.reason.code);
  assert.deepEqual(outcomes, [undefined, "missing", "refused", "finished", "refused", "refused"]);
  host.end();
  assert.deepEqual((await all(session)).map(brief), ["failed", "failed", "failed", "failed", "finished"]);
});

test("session: a get asks one name a line, all at once, and takes its replies by name", async () => {
  await using host = playHost();
  const got = host.session.get("A", "B", "C");
  assert.deepEqual([await host.hears(), await host.hears(), await host.hears()], ["G,A", "G,B", "G,C"]);
  host.say("G,1,B=,A=1", "G,1,C=x,y=z", "G,1,OTHER=3", "G,1,A= 1,B=2,\x01\0x");
  assert.deepEqual(await got, { A: " 1,B=2,\x01\0x", B: ",A=1", C: "x,y=z" });
  assert.deepEqual(await next(host.session), { type: "variables", timestamp: 1, data: "OTHER=3" });
});

test("session: where there is nothing to send Asterisk is asked all the same", async () => {
  await using host = playHost();
  const { session } = host;
  const nothing = Promise.all([session.get(), session.log(""), session.log("\n \0")]);
  for (let i = 0; i < 3; i++) host.say(unset(await host.hears()));
  assert.deepEqual(await nothing, [{}, undefined, undefined]);
});

test("session: a get or params that was sent has its reply with its promise, and nobody else", async () => {
  await using host = playHost();
  const both = host.session.send({ type: "get", names: ["A", "B"] });
  const got = host.session.get("A");
  const params = [host.session.params(), host.session.send({ type: "params" })];
  assert.deepEqual([await host.hears(), await host.hears()], ["G,A,B", "G,A"]);
  host.say("G,1,A=1,B=2", "G,1,A=3", "P,1,ivr://x,y", "P,1,ivr://x,z", "1,1");
  assert.equal(await both, "A=1,B=2");
  assert.deepEqual(await got, { A: "3" });
  assert.deepEqual(await Promise.all(params), [["ivr://x", "y"], ["ivr://x", "z"]]);
  assert.equal(brief(await next(host.session)), "1");
});

test("session: a forged reply answers no question that was not asked for", async () => {
  await using host = playHost();
  const params = host.session.params();
  host.say("G,1,=boo", "G,1,==boo", "G,1,boo", "P,1,ivr://x");
  assert.deepEqual(await params, ["ivr://x"]);
});

test("session: a value that may have been cut is never returned, but stands in the error", async () => {
  for (
    const [value, whole] of [["x".repeat(2043), true], ["x".repeat(2044), false], ["x".repeat(2045), false]] as const
  ) {
    await using host = playHost();
    const got = host.session.get("A", "B");
    host.say("G,1,A=1", `G,1,B=${value}`);
    if (whole) assert.equal((await got)["B"], value);
    else {
      await assert.rejects(got, (error: IvrError) => {
        assert.deepEqual(error.partial, { A: "1", B: value });
        return code("truncated")(error);
      });
    }
  }
  await using host = playHost();
  const got = host.session.get("B");
  host.say("G,1,B=" + "é".repeat(1022)); // 2046 bytes
  await assert.rejects(got, code("truncated"));
});

test("session: no message has a control character, whoever it came from", async () => {
  await using host = playHost();
  const refused = host.session.answer();
  const truncated = host.session.get("A\x1bB");
  host.say("Z,1,\x1b[31m\x07\u202e", `G,1,A\x1bB=${"x".repeat(2050)}`);
  for (const [promise, reason] of [[refused, "refused"], [truncated, "truncated"]] as const) {
    await assert.rejects(promise, (error: Error) => {
      assert.doesNotMatch(error.message, /[\p{Cc}\p{Cf}]/u);
      return code(reason)(error);
    });
  }
});

test("session: log, hangup and exit take any text: log in lines that fit, the others what fits on one", () =>
  forAll(60, async (random) => {
    for (const end of ["hangup", "exit"] as const) {
      await using host = playHost();
      const text = random.text([...AWKWARD, "x".repeat(900), "é€𝄞".repeat(200)], 6);
      host.session.log(text);
      host.session[end](text);
      host.session.exit("too late");
      host.session.close();
      const heard = await host.hearsAll();
      const letters = (text: string) => text.replace(/[\s\p{Cc}]+/gu, "").replace(/\p{Surrogate}/gu, "?");
      const logged = heard.filter((line) => line.startsWith("L,"));
      const [last, ...more] = heard.filter((line) => /^[HE],/.test(line));
      for (const line of [...logged, last!]) {
        assert.match(line, /^.,.*[^ ]$/);
        assert.ok(utf8(line).length <= 1022);
      }
      assert.equal(letters(logged.map((line) => line.slice(2)).join("")), letters(text));
      assert.ok(logged.length >= text.split(/[\r\n]/).filter(letters).length);
      assert.deepEqual(more, []);
      if (letters(text)) assert.ok(letters(text).startsWith(letters(last!.slice(2))), last);
      else assert.equal(last!.slice(2), end);
    }
  }));

// What becomes of prompts

test("outcomes: files settle in the order of the playlist, also the same one three times", async () => {
  await using host = playHost();
  const { session } = host;
  let told: string[] = [];
  for (const prompt of ["a 1", "a 2", "b", "a 3", "c", "d"]) {
    session.queue(prompt[0]!).then((outcome) => told.push(`${prompt} ${outcome}`));
  }
  host.hearsAll((command) => command.startsWith("G,") ? [unset(command)] : []);
  const becomes = async (line: string, ...expected: string[]) => {
    told = [];
    host.say(line);
    await session.get("X");
    assert.deepEqual(told, expected);
  };
  await becomes("F,1,a", "a 1 finished");
  await becomes("T,1,a", "a 2 interrupted");
  await becomes("D,1,other");
  await becomes("F,1,a", "b skipped", "a 3 finished"); // b could not be opened
  await becomes("T,1", "c interrupted"); // as Asterisk 1.6 says it
  told = [];
  await session.interrupt(); // carried out, and nothing said of what waited
  assert.deepEqual(told, ["d skipped"]);
  session.queue("e").then((outcome) => told.push(`e ${outcome}`));
  await becomes("T,1", "e interrupted"); // and not what the I cleared
});

test("outcomes: those of one's own prompts never overflow a call that does not iterate, or left its loop", async () => {
  for (const looped of [false, true]) {
    await using host = playHost({ maxBuffer: 500 });
    const { session } = host;
    if (looped) {
      host.say("1,1");
      await next(session);
    }
    let file = "";
    host.hearsAll((command) => {
      if (command.startsWith("G,")) {
        return file === "nosuch" ? ["Z,1,nosuch", unset(command)] : [unset(command), `F,1,${file}`];
      }
      file = command.slice(2);
      return [];
    });
    for (let i = 0; i < 200; i++) {
      assert.equal(await session.queue(i % 3 ? "beep" : "nosuch"), i % 3 ? "finished" : "missing");
      if (i !== 100) continue;
      host.say("5,1", "Q,1", "Z,1"); // what no promise told is kept
      await pause();
    }
    assert.deepEqual(await session.gather({ maxDigits: 1 }), collected("5", "maxDigits"));
    let event = await next(session);
    while (event && event.type !== "unknown") event = await next(session); // of what promises told some may be there
    assert.deepEqual([event, await next(session)], [parseEvent("Q,1"), parseEvent("Z,1")]);
  }
});

// How a call ends

type Host = ReturnType<typeof playHost>;

const RESET = new Error("reset");

/** How a call ends, what is done for it, and what it is told as. */
const ENDINGS: [name: string, how: (host: Host) => void, ending: Ending][] = [
  ["the caller", ({ say, end }) => (say("H,1"), end()), { by: "caller" }],
  ["our hangup", ({ session, say, end }) => (session.hangup(), say("H,1"), end()), { by: "hangup" }],
  ["the caller, before our exit", ({ session, say, end }) => (session.exit(), say("H,1"), end()), { by: "caller" }],
  ["our exit", ({ session, say, end }) => (session.exit(), say("E,1"), end()), { by: "exit" }],
  ["without a word", ({ end }) => end(), { by: "disconnect" }],
  ["without a word after our exit", ({ session, end }) => (session.exit(), end()), { by: "disconnect" }],
  ["half a line", ({ write, end }) => (write("H,1"), end()), { by: "caller" }],
  ["closed by us", ({ session }) => void session.close(), { by: "disconnect" }],
  ["a reset after H", ({ say, breaks }) => (say("H,1"), void setTimeout(() => breaks(RESET))), { by: "caller" }],
  ["a reset after our E", ({ session, breaks }) => (session.exit(), breaks(RESET)), { by: "exit" }],
];

/** Everything that sends a command, or has none to send. */
const ASKING: ((ivr: Ivr) => Promise<unknown>)[] = [
  (ivr) => ivr.play("a"),
  (ivr) => ivr.queue("a"),
  (ivr) => ivr.set({ A: "1" }),
  (ivr) => ivr.get("A"),
  (ivr) => ivr.get(),
  (ivr) => ivr.params(),
  (ivr) => ivr.log("a"),
  (ivr) => ivr.log(""),
  (ivr) => ivr.sendDtmf("1"),
  (ivr) => ivr.interrupt(),
  (ivr) => ivr.answer(),
  (ivr) => ivr.autoclear(true),
  (ivr) => ivr.send({ type: "play", file: "a" }),
];

/** All of that, and what needs a caller. */
const ANYTHING: ((ivr: Ivr) => Promise<unknown>)[] = [
  ...ASKING,
  (ivr) => ivr.gather(),
  (ivr) => ivr.gather({ prompt: "a", signal: AbortSignal.abort() }),
];

test("session: it is told who ended a call, whatever is under way", async () => {
  for (const [name, how, ending] of ENDINGS) {
    for (const busy of [[], [...ASKING, (ivr: Ivr) => ivr.gather()]]) {
      await using host = playHost();
      for (const ask of busy) ask(host.session);
      how(host);
      assert.deepEqual(await host.session.closed, ending, name);
    }
  }
});

test("session: what is under way when the call ends settles with that", async () => {
  for (const [name, how] of ENDINGS) {
    await using host = playHost();
    const { session } = host;
    const pending = [session.set({ A: "1" }), session.get("A"), session.params(), session.send({ type: "answer" })];
    const prompts = [session.play("a"), session.queue("b")];
    const gathering = session.gather();
    how(host);
    for (const promise of pending) await assert.rejects(promise, code("ended"), name);
    assert.deepEqual(await Promise.all(prompts), ["ended", "ended"]);
    assert.deepEqual(await gathering, collected("", "hangup"));
  }
});

test("session: once it is over its signal is aborted, whatever is asked rejects, and leaving resolves", async () => {
  for (const [, how] of ENDINGS) {
    await using host = playHost();
    const { session } = host;
    const { signal } = session;
    how(host);
    await session.closed;
    assert.ok(signal.aborted && code("ended")(signal.reason));
    for (const late of ANYTHING) await assert.rejects(late(session), code("ended"));
    await Promise.all([session.hangup(), session.exit(), session.close(), session.close()]);
    for await (const event of session) assert.ok(event);
  }
});

test("session: behind its last words Asterisk is sent nothing more, and whatever is asked rejects", async () => {
  for (const last of ["H,1", "E,1"]) {
    await using host = playHost();
    const { session } = host;
    const under = session.play("under way");
    while ((await host.hears()) !== "S,under way");
    await host.hears();
    host.say(last);
    await pause(); // it has been read
    for (const late of ANYTHING) await assert.rejects(late(session), code("ended"));
    const leaving = [session.hangup(), session.exit()];
    host.end();
    assert.equal(await host.hears(), "(end)");
    assert.equal(await under, "ended");
    await Promise.all(leaving);
  }
});

test("session: with the option i no prompt waits for a caller who is gone, whatever the host takes", async () => {
  await using host = playHost();
  host.say("I,1,HANGUP");
  await next(host.session);
  const prompts = [host.session.play("taken"), host.session.queue("refused"), host.session.queue("taken")];
  host.say("G,1,EIVR_ACK_1=", "Z,1", "G,1,EIVR_ACK_2=", "G,1,EIVR_ACK_3=");
  assert.deepEqual(await Promise.all(prompts), ["ended", "refused", "ended"]);
});

test("session: with the option i what tells of a prompt behind the hangup comes too late, however the chunks were cut", async () => {
  const lines = ["I,1,HANGUP", "F,1,a", "G,1,EIVR_ACK_1=", "Z,1,b"];
  for (const chunks of [lines, [lines.join("\n")]]) {
    await using host = playHost();
    const prompts = [host.session.play("a"), host.session.queue("b")];
    for (const chunk of chunks) host.say(chunk);
    assert.deepEqual(await Promise.all(prompts), ["ended", "ended"]);
  }
});

test("session: what stands behind the line at which we close is heard no more, however the chunks were cut", async () => {
  const lines = ["1,1", "I,1,HANGUP", "2,1", "H,1"];
  for (const chunks of [lines, [lines.join("\n")]]) {
    await using host = playHost();
    host.session.signal.addEventListener("abort", () => host.session.close());
    for (const chunk of chunks) host.say(chunk);
    assert.deepEqual((await all(host.session)).map(brief), ["1", "inform"]);
    assert.deepEqual(await host.session.closed, { by: "disconnect" });
  }
});

test("session: an I that tells of no hangup leaves the caller where they are", async () => {
  await using host = playHost();
  host.say("I,1,HANGUPS");
  assert.equal(brief(await next(host.session)), "inform");
  assert.ok(!host.session.signal.aborted);
});

test("session: what stands behind the last newline answers nothing, since it may be cut", async () => {
  for (const rest of ["G,1,FOO=ba", "G,1,FOO", "Z,1", "F,1,a"]) {
    await using host = playHost();
    const got = host.session.get("FOO");
    const played = host.session.play("ab");
    const gathering = host.session.gather();
    host.write(rest);
    host.end();
    await assert.rejects(got, code("ended"));
    assert.equal(await played, "ended");
    assert.deepEqual(await gathering, collected("", "hangup"));
    assert.deepEqual(await all(host.session), [parseEvent(rest)]);
  }
});

test("session: a stream that breaks is the end of a call, after the events before it, and loops just end", async () => {
  await using host = playHost();
  const pending = host.session.set({ A: "1" });
  host.say("1,1");
  setTimeout(() => host.breaks(RESET));
  assert.equal((await all(host.session)).length, 1);
  assert.deepEqual(await host.session.closed, { by: "disconnect", error: RESET });
  await assert.rejects(pending, (error: Error) => code("ended")(error) && error.cause === RESET);
});

test("session: a stream that another call's end broke is no limit of this one", async () => {
  const errors = [new IvrError("ended", "The call is over"), new IvrError("overflow", "Too much elsewhere"), undefined];
  for (const error of errors) {
    await using host = playHost();
    host.breaks(error as Error);
    assert.deepEqual(await all(host.session), []);
    assert.equal((await host.session.closed).by, "disconnect");
  }
});

test("session: a stream of events that breaks breaks off the commands", async () => {
  const broken = new Promise((resolve) => {
    const readable = new ReadableStream({ start: (controller) => controller.error(RESET) });
    new Ivr({ readable, writable: new WritableStream({ abort: resolve, close: () => resolve("closed") }) });
  });
  assert.equal(await broken, RESET);
});

test("session: H that arrives with a reset of the commands is still the caller's", async () => {
  let fail = (_: Error): void => {};
  const events = new TransformStream<Uint8Array, Uint8Array>();
  const writer = events.writable.getWriter();
  const session = new Ivr({
    readable: events.readable,
    writable: new WritableStream({ start: (controller) => void (fail = (error) => controller.error(error)) }),
  });
  fail(new Error("broken pipe"));
  const pending = session.set({ A: "1" });
  setTimeout(() => writer.write(utf8("H,1\n")).then(() => writer.close()));
  assert.deepEqual(await session.closed, { by: "caller" });
  await assert.rejects(pending, code("ended"));
  await session.close();
});

test("session: a listener of the signal may close it, and the loop still has its events", async () => {
  for (const last of ["H,2", "I,2,HANGUP", ""]) {
    await using host = playHost();
    const { session } = host;
    const closed = new Promise<void>((resolve) =>
      session.signal.addEventListener("abort", () => {
        const closing = session.close();
        assert.ok(closing instanceof Promise);
        closing.then(resolve);
      })
    );
    const events = all(session);
    await pause();
    if (last) host.say(last);
    else host.end();
    await closed;
    assert.deepEqual(await events, last ? [parseEvent(last)] : []);
  }
});

/** Who says the last word and does not end the stream, what is said every 300 ms from there, and what came of it. */
const LINGERING: [last: string, again: string, by: Ending["by"], events: string][] = [
  ["H,1", "H,1", "caller", "hangup hangup hangup hangup"],
  ["E,1", "E,1", "exit", "exit exit exit exit"],
  ["H,1", "1,1", "caller", "hangup 1 1 1"],
];

test("session: a peer that says H or E and does not end the stream is left after a second", async () => {
  for (const [last, again, by, expected] of LINGERING) {
    await inTime(async (seconds) => {
      await using host = playHost();
      const events = all(host.session);
      host.say(last);
      const talking = setInterval(() => host.say(again), 300);
      const pending = host.session.set({ A: "1" });
      if (by === "exit") await host.session.exit();
      assert.deepEqual(await host.session.closed, { by });
      clearInterval(talking);
      await assert.rejects(pending, code("ended"));
      assertNear(seconds(), 1, 0.1);
      assert.equal((await events).map(brief).join(" "), expected);
    });
  }
});

test("session: close ends in time, whatever the streams do, whoever closes, and gives up what does not", async () => {
  for (const last of ["", "H,1\n"]) {
    await inTime(async (seconds) => {
      const given: string[] = [];
      const abort = () => Promise.resolve(void given.push("up"));
      const streams = bare({ abort });
      if (last) streams.readable = streamOf(utf8(last)) as never;
      const session = new Ivr(streams);
      const closed = new Promise<void>((resolve) =>
        session.signal.addEventListener("abort", () => void session.close().then(resolve))
      );
      session.log("into the void");
      if (!last) session.close();
      await closed;
      assertNear(seconds(), 1, 0.1);
      assert.deepEqual(given, ["up"]);
    });
  }
});

const broken = new Error("no such account");

test("session: streams that throw at once, or give no promise, are closed and break as others do", async () => {
  const ways: (() => Promise<void>)[] = [
    () => Promise.resolve(),
    () => Promise.reject(new Error("later")),
    () => {
      throw new Error("at once");
    },
    () => undefined as never,
  ];
  for (const close of ways) {
    for (const cancel of ways) {
      const streams = bare({ write: () => Promise.resolve(), close, cancel });
      await new Ivr(streams).close();
      await assert.rejects(answer(streams, () => Promise.reject(broken)), (error) => error === broken);
    }
    const session = new Ivr(bare({ read: close, close: ways[0]!, cancel: ways[0]! }));
    assert.equal((await session.closed).by, "disconnect");
    await session.close();
  }
});

test("session: a sink that takes its time has one write at a time, with all that was asked meanwhile, and then its end", () =>
  inTime(async (seconds) => {
    const did: string[] = [];
    let takes = false;
    const slowly = async (what: string) => {
      assert.ok(!takes, "the one before is done");
      takes = true;
      await pause(300);
      takes = false;
      did.push(`${what} at ${seconds().toFixed(1)}`);
    };
    const { readable } = bare({ cancel: () => Promise.resolve() });
    const session = new Ivr({
      readable,
      writable: {
        getWriter: () => ({
          write: (chunk) => slowly(new TextDecoder().decode(chunk).replace(/\nG,.*\n|\n/g, "")),
          close: () => slowly("end"),
          abort: () => Promise.resolve(),
        }),
      },
    });
    session.log("1");
    session.log("2");
    await pause(100);
    session.log("3");
    await pause(100);
    session.log("4");
    await session.close();
    assert.deepEqual(did, ["L,1L,2 at 0.3", "L,3L,4 at 0.6", "end at 0.9"]);
  }));

test("session: behind a write that broke, or was given up, nothing is written", () =>
  inTime(async () => {
    for (const broke of [true, false]) {
      const did: string[] = [];
      const write = async () => {
        did.push("write");
        await pause(broke ? 1 : 1500);
        if (broke) throw RESET;
      };
      const abort = () => Promise.resolve(void did.push("abort"));
      const session = new Ivr(bare({ write, abort, close: never, cancel: () => Promise.resolve() }));
      session.log("1");
      await Promise.resolve();
      await Promise.resolve();
      session.log("2");
      if (!broke) await session.close();
      await session.closed;
      await pause(3000);
      assert.deepEqual(did, ["write", "abort"]);
    }
  }));

test("session: a constructor that finds a stream locked keeps no lock of the other", () => {
  for (const locked of ["readable", "writable"] as const) {
    const streams = { readable: streamOf(), writable: new WritableStream() };
    if (locked === "readable") streams.readable.getReader();
    else streams.writable.getWriter();
    assert.throws(() => new Ivr(streams), TypeError);
    assert.equal(streams.readable.locked, locked === "readable");
    assert.equal(streams.writable.locked, locked === "writable");
  }
});

// One call never stops another

/** Asks again and again, whatever comes of it, while the event loop is to have ten turns for everybody else. */
async function insist(again: () => Promise<unknown>): Promise<void> {
  let turns = 0;
  const others = (async () => {
    for (; turns < 10; turns++) await pause();
  })();
  while (turns < 10) await again().catch(() => {});
  await others;
}

test("session: a call that goes on trying when it is over stops nobody else", async () => {
  const more: typeof ANYTHING = [(ivr) => ivr.hangup(), (ivr) => ivr.exit(), (ivr) => ivr.play(""), (ivr) => all(ivr)];
  for (const again of [...ANYTHING, ...more]) {
    await using host = playHost();
    host.say("H,1");
    host.end();
    await host.session.closed;
    await insist(() => again(host.session));
  }
});

test("session: one that failed by itself, or that has nothing to send, stops nobody else either", async () => {
  await using host = playHost({ maxBuffer: 10 });
  host.write("x".repeat(100));
  await host.session.closed;
  await insist(() => all(host.session));
  await insist(() => host.session.log(""));
});

test("session: a loop of which several wait when a limit ends it stops nobody else either", async () => {
  await using host = playHost({ maxBuffer: 10 });
  const loop = host.session[Symbol.asyncIterator]();
  const waiting = [loop.next(), loop.next(), loop.next()];
  host.write("1,1\n" + "x".repeat(100));
  assert.deepEqual(brief((await waiting[0]!).value), "1");
  for (const late of waiting.slice(1)) await assert.rejects(late, code("overflow"));
  await insist(() => loop.next());
});

test("session: one that gathers with a signal that was aborted before, or is none, stops nobody else either", async () => {
  await using host = playHost();
  await insist(() => host.session.gather({ signal: AbortSignal.abort() }));
  await insist(() => host.session.gather({ signal: new AbortController() as unknown as AbortSignal }));
  await insist(() => host.session.gather(null as unknown as object));
});

// What waits is bounded

test("session: what waits is bounded, events and the unfinished line, and overflow comes after them", async () => {
  const texts = [
    "1,1\n".repeat(13),
    "1,1\n".repeat(11) + "x".repeat(9),
    "x".repeat(60),
    "1,1\n".repeat(5) + "x".repeat(55) + "\n",
  ];
  for (const text of texts) {
    for (const size of [1, 7, 1000]) {
      await using host = playHost({ maxBuffer: 50 });
      for (const chunk of cut(text, size)) host.write(chunk);
      const { by, error } = await host.session.closed;
      assert.equal(by, "error");
      assert.ok(code("overflow")(error));
      let seen = 0;
      await assert.rejects(async () => {
        for await (const event of host.session) seen += event.type === "dtmf" ? 1 : 0;
      }, code("overflow"));
      assert.ok(seen <= text.split("\n").length - 1 && seen >= Math.min(12, text.split("1,1").length - 1), `${seen}`);
    }
  }
});

test("session: of a command one refusal is told, and more of them are events as others, bounded", async () => {
  for (const loops of [false, true]) {
    await using host = playHost({ maxBuffer: 500 });
    const events = loops ? all(host.session) : undefined;
    const refused = host.session.autoclear(true);
    const prompt = host.session.queue("a");
    host.say("Z,1", "Z,1,again", "G,1,EIVR_ACK_1=", "G,1,EIVR_ACK_2=", "F,1,a");
    await assert.rejects(refused, code("refused"));
    assert.equal(await prompt, "finished");
    const silent = host.session.set({ A: "1" });
    host.write("Z,1\n".repeat(1000));
    if (loops) host.say("H,1");
    if (loops) host.end();
    await assert.rejects(silent, code("refused"));
    assert.equal((await host.session.closed).by, loops ? "caller" : "error");
    if (loops) assert.equal((await events)!.length, 1004);
  }
});

test("session: commands whose answers never come are bounded", async () => {
  for (const [count, by] of [[20_000, "caller"], [20_001, "error"]] as const) {
    await using host = playHost();
    const commands = Promise.allSettled(Array.from({ length: count }, () => host.session.interrupt()));
    host.say("1,1");
    await next(host.session).catch(code("overflow"));
    host.say("H,1");
    host.end();
    assert.equal((await host.session.closed).by, by);
    for (const { reason } of await commands as PromiseRejectedResult[]) assert.ok(code("ended")(reason));
  }
});

test("session: what waits to be written is bounded, and ends no sooner in a call that is read", async () => {
  for (const reads of [true, false]) {
    let tell!: ReadableStreamDefaultController<Uint8Array>;
    const readable = new ReadableStream<Uint8Array>({ start: (controller) => void (tell = controller) });
    const write = () => reads ? Promise.resolve() : never();
    const session = new Ivr({ readable, writable: new WritableStream({ write }) });
    for (let i = 1; i < 2000; i++) {
      session.send({ type: "log", message: "x".repeat(1000) });
      tell.enqueue(utf8(`G,1,EIVR_ACK_${i}=\n`)); // whoever counts on may acknowledge without reading
      if (i % 100 === 0) await pause();
    }
    if (reads) tell.enqueue(utf8("H,1\n")), tell.close();
    const { by, error } = await session.closed;
    assert.equal(by, reads ? "caller" : "error");
    if (!reads) assert.ok(code("overflow")(error));
  }
});

test("session: limits that are no numbers from 1 are refused, and the streams stay free", () => {
  for (const limit of [{ maxBuffer: 0 }, { maxBuffer: NaN }, { keepAlive: 0 }, { keepAlive: -5 }, { keepAlive: "5" }]) {
    const streams = { readable: streamOf(), writable: new WritableStream() };
    assert.throws(() => new Ivr(streams, limit as SessionOptions), refuses(Object.keys(limit)[0]!, "read"));
    assert.ok(!streams.readable.locked && !streams.writable.locked);
  }
});

test("session: a consumer that keeps up never overflows, however fast the bytes come", async () => {
  await using host = playHost({ maxBuffer: 100 });
  host.write("1,1795372496\nF,1795372496,beep\n".repeat(50_000));
  host.end();
  let seen = 0;
  for await (const event of host.session) seen += event.type === "dtmf" || event.type === "finished" ? 1 : 0;
  assert.equal(seen, 100_000);
  assert.deepEqual(await host.session.closed, { by: "disconnect" });
});

test("session: a consumer that takes an event every turn or every other one keeps up as well", async () => {
  for (const turns of [1, 2]) {
    await using host = playHost({ maxBuffer: 120 });
    host.write("F,1,x\n".repeat(300));
    host.end();
    let seen = 0;
    for await (const _ of host.session) {
      seen++;
      for (let turn = 0; turn < turns; turn++) await pause();
    }
    assert.equal(seen, 300);
  }
});

test("session: a consumer that took just as much as came keeps up as well", async () => {
  for (const [waits, comes] of Array.from({ length: 25 }, (_, i) => [4 + i % 5, 1 + Math.floor(i / 5)] as const)) {
    await using host = playHost({ maxBuffer: 100 });
    const loop = host.session[Symbol.asyncIterator]();
    host.write("F,1,abcde\n".repeat(waits));
    await pause();
    host.write("F,1,abcde\n".repeat(comes) + "F,1," + "x".repeat(41));
    for (let left = waits + comes; left--;) {
      await pause();
      assert.equal(brief((await loop.next()).value), "finished");
    }
    host.write("\n");
    assert.equal(brief((await loop.next()).value), "finished");
  }
});

/** A clock on which each turn of the event loop takes a millisecond. */
class SlowTurns extends VirtualClock {
  override after(time: number, run: () => void): unknown {
    return super.after(Math.max(time, 1000), run);
  }
}

test("session: while reading waits for a consumer it is not the peer that is silent", () =>
  inTime(async (seconds) => {
    await using host = playHost({ maxBuffer: 120, keepAlive: 30 });
    host.write("F,1,x\n".repeat(300));
    host.end();
    let seen = 0;
    for await (const _ of host.session) {
      seen++;
      await new Promise((resolve) => setTimeout(resolve));
    }
    assert.equal(seen, 300);
    assert.ok(seconds() > 0.2, "longer than a peer may be silent");
    assert.equal(await host.hears(), "(end)", "no question went out");
  }, new SlowTurns()));

test("session: keys that wait while a gather plays, and other events behind them, cost each their own", async () => {
  await using host = playHost({ maxBuffer: 1e6 });
  const events = all(host.session);
  const gathering = host.session.gather({ prompt: "a", bargeIn: false, maxDigits: 1 });
  host.write("1,1\n".repeat(50_000) + "Q,1\n".repeat(50_000));
  host.say("F,1,a", "H,1");
  host.end();
  assert.deepEqual(await gathering, collected("1", "maxDigits", "finished"));
  const { dtmf, unknown } = Object.groupBy(await events, ({ type }) => type);
  assert.deepEqual([dtmf?.length, unknown?.length], [49_999, 50_000]);
});

// Whether the peer still lives

test("keepAlive: a question goes out in a silence, and another silence ends the call", async () => {
  for (const answers of [0, 3]) {
    await inTime(async (seconds) => {
      await using host = playHost({ keepAlive: 10_000 });
      const asked: number[] = [];
      host.hearsAll((question) => {
        asked.push(Math.round(seconds()));
        return asked.length <= answers ? [unset(question)] : [];
      });
      assert.deepEqual(await host.session.closed, { by: "disconnect" });
      assert.equal(Math.round(seconds()), 10 * (answers + 2));
      assert.deepEqual(asked, [10, 20, 30, 40].slice(0, answers + 1));
      assert.deepEqual(await all(host.session), []); // what it asked is nobody's
    });
  }
});

// Keys for whom they are

test("gather: keys that it leaves reach the iterator, in order", async () => {
  await using host = playHost();
  const gathering = host.session.gather({ prompt: "a", bargeIn: false, maxDigits: 1 });
  const events = host.session[Symbol.asyncIterator]();
  const seen = [events.next(), events.next(), events.next()];
  host.say("1,1", "2,1", "3,1", "F,1,a");
  assert.deepEqual(await gathering, collected("1", "maxDigits", "finished"));
  assert.deepEqual((await Promise.all(seen)).map(({ value }) => brief(value)), ["finished", "2", "3"]);
});

test("gather: keys that it leaves when the call ends are for the loop", async () => {
  for (const last of [["H,1"], []]) {
    await using host = playHost();
    const events = all(host.session);
    const gathering = host.session.gather({ prompt: "a", maxDigits: 1 });
    host.say("1,1", "2,1", ...last);
    host.end();
    assert.deepEqual(await gathering, collected("1", "maxDigits", "ended"));
    assert.deepEqual((await events).map(brief).sort(), ["2", ...last.map(() => "hangup")]);
  }
});

/** Ways to gather from eight keys. */
const GATHERINGS = [true, false].flatMap((bargeIn) =>
  [1, 2, 7].map((maxDigits) => ({ prompt: "a", bargeIn, maxDigits }))
);
const EIGHT = [..."12345678"].map((key) => `${key},1\n`).join("");

/** The keys that a gather and a loop had, in this order. */
async function keysOf(gathering: Promise<Gathered>, events: Promise<IvrEvent[]>): Promise<string> {
  const { digits } = await gathering;
  return digits + (await events).filter(({ type }) => type === "dtmf").map(brief).join("");
}

const ENDS: [name: string, end: (host: Host) => unknown][] = [
  ["the stream ends", (host) => host.end()],
  ["the caller hangs up", (host) => (host.say("H,1"), host.end())],
  ["we close", (host) => host.session.close()],
];

test("gather: keys that it leaves at the end are for the loop, however the call ends, and when", async () => {
  for (const [name, end] of ENDS) {
    for (const options of GATHERINGS) {
      for (const [pauses, closes] of [[0], [1], [2], [0, "too"], [1, "too"], [2, "too"]] as const) {
        await using host = playHost();
        if (closes) host.session.signal.addEventListener("abort", () => host.session.close());
        const events = all(host.session);
        const gathering = host.session.gather(options);
        host.write(EIGHT);
        for (let i = 0; i < pauses; i++) await pause();
        end(host);
        const came = pauses || name !== "we close";
        assert.equal(await keysOf(gathering, events), came ? "12345678" : "", `${name} after ${pauses} turns`);
      }
    }
  }
});

test("gather: keys that it leaves with a chunk that is the end as well are for the loop", async () => {
  for (const options of GATHERINGS) {
    const chunk = Promise.withResolvers<void>();
    const read = async () => (await chunk.promise, { done: true, value: utf8(EIGHT) } as never);
    const ivr = new Ivr(bare({ read, write: () => Promise.resolve(), close: () => Promise.resolve() }));
    const events = all(ivr);
    const gathering = ivr.gather(options);
    chunk.resolve();
    assert.equal(await keysOf(gathering, events), "12345678");
  }
});

test("gather: one that was aborted before it began, or that could not begin, leaves the keys to the next", async () => {
  await using host = playHost();
  host.say("1,1", "2,1", "3,1");
  await pause();
  const aborted = host.session.gather({ signal: AbortSignal.abort() });
  assert.deepEqual(await host.session.gather({ timeout: 0, maxDigits: 1 }), collected("1", "maxDigits")); // meanwhile
  assert.deepEqual(await aborted, collected("", "aborted"));
  for (const options of [{ signal: {} as AbortSignal }, { timeout: "5" as unknown as number }]) {
    await assert.rejects(host.session.gather(options));
  }
  assert.deepEqual(await host.session.gather({ maxDigits: 2 }), collected("23", "maxDigits"));
});

test("gather: a queue of somebody's own is not asked for its prompts, so what that throws is nothing to it", async () => {
  await using host = playHost();
  host.session.queue = () => Promise.reject(new Error("no sound"));
  const gathering = host.session.gather({ prompt: "a", timeout: 0 });
  assert.equal(await host.hears(), "A,a");
  host.say(unset(await host.hears()), "F,1,a");
  assert.deepEqual(await gathering, collected("", "timeout", "finished"));
});

test("gather: behind the end it rejects with that, though another has not settled yet", async () => {
  await using host = playHost();
  const under = host.session.gather({ prompt: "a" });
  host.session.close();
  await assert.rejects(host.session.gather(), code("ended"));
  assert.deepEqual(await under, collected("", "hangup", "ended"));
});

test("gather: a key behind the end of the prompts interrupts nothing", async () => {
  await using host = playHost();
  const gathering = host.session.gather({ prompt: "a", maxDigits: 1 });
  assert.equal(await host.hears(), "A,a");
  host.say(unset(await host.hears()), "F,1,a", "7,1");
  assert.deepEqual(await gathering, collected("7", "maxDigits", "finished"));
  host.session.log("next");
  assert.equal(await host.hears(), "L,next");
});

test("gather: a prompt that nobody could open is over with the next command that clears the playlist", async () => {
  for (const clear of ["interrupt", "play"] as const) {
    await using host = playHost();
    host.say("1,1");
    await pause();
    const gathering = host.session.gather({ prompt: "unopenable", bargeIn: false, maxDigits: 1 });
    assert.equal(await host.hears(), "A,unopenable"); // which the key that waits does not skip
    await host.acknowledges();
    const cleared = host.session[clear]("next");
    await host.hears();
    await host.acknowledges();
    if (clear === "interrupt") await cleared;
    assert.deepEqual(await gathering, collected("1", "maxDigits", "skipped"));
  }
});

test("gather: ends as soon as writing breaks, however long it would wait", () =>
  inTime(async (seconds) => {
    const session = new Ivr(bare({ write: () => Promise.reject(broken) }));
    assert.deepEqual(await session.gather({ prompt: "a" }), collected("", "hangup", "ended"));
    assertNear(seconds(), 0, 0.1);
    await session.close();
  }));

// A handler's call

/** What `fetch` does with a signal. */
const aborted = (signal: AbortSignal) =>
  new Promise<never>((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));

const abortError = (cause: unknown) =>
  new DOMException("The operation was aborted", { name: "AbortError", cause } as never);

const lookalike = Object.assign(new Error("no transaction"), { code: "ended" });

/** A handler, what Asterisk says meanwhile, and what becomes of the call: how it ended, or the error or its code. */
const HANDLERS: [
  name: string,
  (ivr: Ivr) => Promise<unknown>,
  says: string[],
  Ending | { error: unknown } | IvrErrorCode,
][] = [
  ["it exits", (ivr) => ivr.exit(), ["E,1"], { by: "exit" }],
  ["it returns", (ivr) => ivr.get("A"), ["G,1,A="], { by: "disconnect" }],
  ["a command is overtaken by the hangup", (ivr) => ivr.set({ A: "1" }), ["H,1"], { by: "caller" }],
  ["a command is refused just before the hangup", (ivr) => ivr.interrupt(), ["Z,1", "H,1"], { by: "caller" }],
  ["it asks when all is over", (ivr) => ivr.closed.then(() => ivr.play("a")), ["H,1"], { by: "caller" }],
  [
    "it asks for more behind its exit",
    async (ivr) => {
      for await (const { type } of ivr) if (type === "exit") break;
      await ivr.log("more");
    },
    ["E,1", "1,1"],
    { by: "exit" },
  ],
  [
    "it loops for ever",
    async (ivr) => {
      for (;;) await ivr.play("moh");
    },
    ["H,1"],
    { by: "caller" },
  ],
  ["it iterates", (ivr) => all(ivr), ["1,1", "H,1"], { by: "caller" }],
  ["it waits with the signal", (ivr) => aborted(ivr.signal), ["H,1"], { by: "caller" }],
  [
    "what it waits with has its own error",
    (ivr) => aborted(ivr.signal).catch((cause) => Promise.reject(abortError(cause))),
    ["H,1"],
    { by: "caller" },
  ],
  ["it throws", () => Promise.reject(broken), [], { error: broken }],
  ["it throws after the hangup", (ivr) => ivr.closed.then(() => Promise.reject(broken)), ["H,1"], { error: broken }],
  ["it throws nothing", () => Promise.reject(undefined), [], { error: undefined }],
  ["it throws what only looks like an end", (ivr) => ivr.closed.then(() => Promise.reject(lookalike)), ["H,1"], {
    error: lookalike,
  }],
  ["another call's end is an error of this one", () => Promise.reject(new IvrError("ended", "not here")), [], "ended"],
  ["a value is wrong", (ivr) => ivr.play(""), [], "invalid"],
  ["Asterisk refuses", (ivr) => ivr.answer(), ["Z,1,ANSWER_FAILURE"], "refused"],
  ["too much waits", (ivr) => ivr.closed, ["x".repeat(200)], "overflow"],
  ["too much waits, and it iterates", (ivr) => all(ivr), ["x".repeat(200)], "overflow"],
];

test("answer: holds a call to its end and closes both streams, whatever the handler does", async () => {
  for (const [name, handler, says, expected] of HANDLERS) {
    const closed: string[] = [];
    let tell!: ReadableStreamDefaultController<Uint8Array>;
    const streams = {
      readable: new ReadableStream<Uint8Array>({
        start: (controller) => void (tell = controller),
        cancel: () => void closed.push("readable"),
      }),
      writable: new WritableStream<Uint8Array>({
        close: () => void closed.push("writable"),
        abort: () => void closed.push("writable"),
      }),
    };
    const call = answer(streams, (ivr) => handler(ivr) as Promise<void>, { maxBuffer: 100 });
    for (const line of says) tell.enqueue(utf8(line + "\n"));
    if (/^[HE],/.test(says.at(-1) ?? "")) tell.close(), closed.push("readable");
    if (typeof expected === "string") await assert.rejects(call, code(expected), name);
    else assert.deepEqual(await call.catch((error) => ({ error })), expected, name);
    assert.deepEqual(closed.sort(), ["readable", "writable"], name);
  }
});

test("answer: a command that was asked behind the one with which writing broke is no failure of the handler", async () => {
  const streams = {
    readable: new ReadableStream(),
    writable: new WritableStream({ write: () => Promise.reject(broken) }),
  };
  const call = answer(streams, async (ivr) => {
    ivr.autoclear(true);
    await aborted(ivr.signal).catch(() => ivr.autoclear(false));
  });
  assert.deepEqual(await call, { by: "disconnect", error: broken });
});

test("answer: a handler that was refused ends its call within a second, though the host says nothing that matters more", () =>
  inTime(async (seconds) => {
    for (const says of ["", "1,1\n"]) {
      const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
      const writer = writable.getWriter();
      const began = seconds();
      const call = answer({ readable, writable: new WritableStream() }, (ivr) => ivr.interrupt());
      const talking = setInterval(() => says && writer.write(utf8(says)), 300);
      writer.write(utf8("Z,1\n"));
      await assert.rejects(call, code("refused"));
      clearInterval(talking);
      assertNear(seconds() - began, 1, 0.1);
    }
  }));

test("answer: a command that met the hangup is no failure, whatever Asterisk says of it; any other refusal is, and names it", async () => {
  for (const reason of ["", "ANSWER_FAILURE", "GENERATOR_FAILURE"]) {
    const call = (...lines: string[]) => {
      const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>();
      const host = writable.getWriter();
      host.write(utf8([reason ? `Z,1,${reason}` : "Z,1", ...lines, ""].join("\n")));
      const answers = new WritableStream({
        write: (bytes) =>
          void (/P,params/.test(new TextDecoder().decode(bytes)) && host.write(utf8("P,1,ivr://host\n"))),
      });
      return answer({ readable, writable: answers }, (ivr) => ivr.answer());
    };
    assert.deepEqual(await call("H,1"), { by: "caller" });
    await assert.rejects(call("1,1"), (error: IvrError) => {
      assert.equal(error.reason, reason || undefined);
      assert.equal(error.message, `Asterisk refused answer: ${reason || "channel not up"}`);
      return code("refused")(error);
    });
  }
});

test("answer: options out of range end the call, and no handler is asked", async () => {
  for (const options of [{ keepAlive: NaN }, { maxBuffer: -Infinity }]) {
    const closed: string[] = [];
    const streams = {
      readable: new ReadableStream({ cancel: () => void closed.push("readable") }),
      writable: new WritableStream({ close: () => void closed.push("writable") }),
    };
    const [[field, value] = []] = Object.entries(options);
    const call = answer(streams, () => Promise.reject(new Error("a handler")), options);
    await assert.rejects(call, (error: IvrError) => {
      assert.ok(error.message.includes(`: ${field} ${value} has to be a number from 1`), error.message);
      return refuses(field!, "read")(error);
    });
    assert.deepEqual(closed.sort(), ["readable", "writable"]);
  }
});

test("answer: a command that is refused since nobody answered the channel is the handler's failure", () =>
  assert.rejects(inCall((ivr) => ivr.interrupt(), { options: "n" }), code("refused")));

test("answer: takes no call whose stream is locked", async () => {
  const streams = { readable: streamOf(), writable: new WritableStream() };
  streams.writable.getWriter();
  await assert.rejects(answer(streams, () => assert.fail()), TypeError);
});

// ---------------------------------------------------------------------------------------------------------
// 5. Session and stand-in, in virtual time
//
// Against an Asterisk that plays, waits and stalls as the real one does, commands come through at once, prompts and keys
// take their time, and whatever goes wrong on the way ends the call and nothing else.
// ---------------------------------------------------------------------------------------------------------

// Commands come through

test("burst: twenty commands at once are acknowledged within 50 ms", () =>
  inCall(async (ivr, { host }) => {
    const began = host.at;
    await Promise.all(Array.from({ length: 20 }, (_, i) => ivr.set({ [`V${i}`]: `${i}` })));
    assert.ok(host.at - began < 0.05, `${host.at - began} s`);
    assert.equal(Object.keys(host.variables).length, 20);
  }));

test("burst: one command at a time takes little more than the millisecond to the wake-up", () =>
  inCall(async (ivr, { host }) => {
    const began = host.at;
    for (let i = 0; i < 100; i++) await ivr.set({ V: `${i}` });
    assert.ok((host.at - began) / 100 < 0.002, `${(host.at - began) * 10} ms each`);
  }));

test("burst: a naive client waits for ever, and not on Asterisk 13", async () => {
  for (const [version, done] of [[22, 1], [15, 1], [13, 20]] as const) {
    const call = dialStreams(async ({ writable }) => {
      const writer = writable.getWriter();
      for (let i = 0; i < 20; i++) writer.write(utf8(`V,V${i}=1\n`));
      await pause(60_000);
      assert.equal(Object.keys(call.variables).length, done);
      await writer.close(); // which lets the backlog through
    }, { version });
    await call.over();
    assert.equal(Object.keys(call.variables).length, 20);
  }
});

test("burst: commands behind a D that blocks, sent with it or during it, follow within 50 ms of its end", async () => {
  for (const wait of [0, 1, 100, 700, 1250]) {
    await inCall(async (ivr, { host }) => {
      const dtmf = ivr.sendDtmf("1234", { interval: 200, duration: 100 });
      await pause(wait);
      const sets = Array.from({ length: 5 }, (_, i) => ivr.set({ [`V${i}`]: "1" }));
      await dtmf;
      const end = host.at;
      assert.ok(end >= 1.3 && end < 1.35, `${end}`);
      await Promise.all(sets);
      assert.ok(host.at - end < 0.05, `${host.at - end} s after ${wait} ms`);
    });
  }
});

test("burst: any number of commands at any times gets through, in order", () =>
  forAll(40, (random) =>
    inCall(async (ivr, { host }) => {
      const done: number[] = [];
      const sent: Promise<unknown>[] = [];
      for (let i = 0; i < 60; i++) {
        sent.push((random.below(20) ? ivr.set({ LAST: `${i}` }) : ivr.sendDtmf("12")).then(() => done.push(i)));
        if (random.below(3) === 0) await pause(random.of([0, 1, 2, 5, 300]));
      }
      await Promise.all(sent);
      assert.deepEqual(done, done.toSorted((a, b) => a - b));
      assert.equal(done.length, 60);
      assert.ok(host.variables["LAST"]);
    }, { version: random.of([22, 13]), faults: { chunk: 1 + random.below(20) } })));

test("wake-ups: they come after a millisecond, then ever more slowly, and no faster than one a second", () =>
  inTime(async (seconds) => {
    const times: number[] = [];
    const session = new Ivr({
      readable: new ReadableStream(),
      writable: new WritableStream({ write: () => void times.push(seconds() * 1000) }),
    });
    session.send({ type: "unknown", line: "half a line that is never finished" });
    await pause(10_000);
    const waits = times.slice(1).map((at, i) => Math.round(at - times[i]!));
    assert.deepEqual(waits.slice(0, 12), [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000]);
    await session.close();
  }));

test("timers: none runs while nothing is awaited", () =>
  inCall(async (ivr, { clock }) => {
    assert.equal(clock.pending, 0);
    const set = ivr.set({ A: "1" });
    assert.ok(clock.pending > 0);
    await set;
    assert.equal(clock.pending, 0);
  }));

test("keepAlive: whoever speaks is not asked, and whoever answers lives", async () => {
  const call = dialStreams(async (streams) => {
    const { by } = await answer(streams, async (ivr) => {
      assert.equal(await ivr.play("hour"), "finished");
      await ivr.exit();
    }, { keepAlive: 20_000 });
    assert.equal(by, "exit");
  }, { sounds: { hour: 3600 } });
  call.plan(Array.from({ length: 60 }, (_, i) => [i * 15, "press", "1"]));
  await call.wait(3550);
  await call.over();
  const acknowledged = call.notes.filter(({ kind, text }) => kind === "command" && text.startsWith("G,EIVR_"));
  const questions = acknowledged.slice(1); // the first is of the prompt
  assert.ok(questions.every(({ at }) => at > 59 * 15), "not while keys come");
  assert.equal(questions.length, Math.floor((3600 - 59 * 15) / 20));
  assert.equal(call.clock.pending, 0);
  assert.doesNotMatch(call.transcript(), /EIVR_/);
});

// Variables

test("get: values come back whole, whatever they hold", () =>
  forAll(30, (random) => {
    const names = ["A", "B", "LONG_NAME", "C"];
    const value = () => random.text(["A=", ",B=", ",", "=", "x", " ", "é", "C=,A=", "EIVR_ACK_1="], 8);
    const variables = Object.fromEntries(names.map((name) => [name, value()]));
    return inCall(async (ivr) => {
      assert.deepEqual(await ivr.get(...names, "NOPE", "EXTEN"), { ...variables, NOPE: "", EXTEN: "" });
      assert.deepEqual((await ivr.params()).slice(1), ["one", "two three"]);
    }, { variables, args: ["one", "two three"], faults: { chunk: () => 1 + random.below(30) } });
  }));

test("get: a variable is before a global of its name, and a function is no variable", () =>
  inCall(async (ivr) => {
    await ivr.set({ A: "channel", "CALLERID(name)": "Bob", __INHERITED: "1" });
    const values = { A: "channel", B: "global", "CALLERID(name)": "", INHERITED: "1" };
    assert.deepEqual(await ivr.get("A", "B", "CALLERID(name)", "INHERITED"), values);
  }, { globals: { A: "global", B: "global" } }));

test("get: what is longer than the reply can be is truncated", () =>
  inCall(async (ivr) => {
    await assert.rejects(ivr.get("LONG"), code("truncated"));
  }, { variables: { LONG: "x".repeat(3000) } }));

// What becomes of a prompt

test("outcomes: files finish one by one; what clears the playlist interrupts one and drops the rest", () =>
  inCall(async (ivr) => {
    const queued = [ivr.queue("short"), ivr.queue("short"), ivr.queue("long"), ivr.queue("medium")];
    assert.equal(await queued[1], "finished");
    await pause(100);
    assert.equal(await ivr.play("medium"), "finished");
    assert.deepEqual(await Promise.all(queued), ["finished", "finished", "interrupted", "dropped"]);
  }));

test("outcomes: a file that could not be opened is skipped, as whatever follows it tells", () =>
  inCall(async (ivr) => {
    const queued = [ivr.queue("short"), ivr.queue("broken"), ivr.queue("long"), ivr.queue("medium")];
    assert.equal(await queued[0], "finished");
    await pause(100);
    assert.equal(await ivr.play("medium"), "finished");
    assert.deepEqual(await Promise.all(queued), ["finished", "skipped", "interrupted", "dropped"]);
  }, { unreadable: ["broken"] }));

test("outcomes: a file that does not exist is missing, whatever plays", () =>
  inCall(async (ivr) => {
    const queued = ivr.queue("short");
    assert.deepEqual(await Promise.all([ivr.queue("nosuch"), ivr.play("nosuch")]), ["missing", "missing"]);
    assert.equal(await queued, "finished");
  }));

test("outcomes: what our own exit overtakes is ended", () =>
  inCall(async (ivr) => {
    const last = ivr.play("medium");
    const unheard = [ivr.queue("broken"), ivr.queue("short")];
    assert.equal(await last, "finished");
    ivr.queue("long");
    await ivr.exit();
    assert.deepEqual(await Promise.all(unheard), ["ended", "ended"]);
  }, { unreadable: ["broken"] }));

test("outcomes: of plays in quick succession the last is heard", () =>
  inCall(async (ivr) => {
    const outcomes = await Promise.all([ivr.play("long"), ivr.play("medium"), ivr.play("short")]);
    assert.equal(outcomes[2], "finished");
    for (const outcome of outcomes.slice(0, 2)) assert.match(outcome, /^(dropped|interrupted)$/);
  }));

test("outcomes: while the channel is not answered what plays is refused, and variables are not", () =>
  inCall(async (ivr) => {
    assert.equal(await ivr.play("short"), "refused");
    assert.equal(await ivr.queue("short"), "refused");
    await assert.rejects(ivr.interrupt(), code("refused"));
    await assert.rejects(ivr.autoclear(true), code("refused"));
    await assert.rejects(ivr.send({ type: "play", file: "short" }), code("refused"));
    await ivr.set({ A: "1" });
    assert.deepEqual(await ivr.get("A", "B"), { A: "1", B: "" });
    assert.deepEqual(await ivr.gather({ prompt: "short", timeout: 100 }), collected("", "timeout", "refused"));
  }, { options: "n" }));

test("outcomes: once the channel is answered it plays, and may be answered again", () =>
  inCall(async (ivr) => {
    assert.equal(await ivr.play("short"), "refused");
    await ivr.answer();
    assert.equal(await ivr.play("short"), "finished");
    await ivr.answer();
  }, { options: "n" }));

test("outcomes: a channel that cannot be answered says so, and refuses what plays", () =>
  inCall(async (ivr) => {
    await assert.rejects(ivr.answer(), /ANSWER_FAILURE/);
    assert.equal(await ivr.play("short"), "refused");
  }, { options: "n", answerable: false }));

test("outcomes: with the option d, on a dead channel, nothing plays and variables still work", () =>
  inCall(async (ivr) => {
    assert.equal(await ivr.play("short"), "refused");
    await ivr.set({ A: "1" });
    await ivr.sendDtmf("1");
    assert.deepEqual(await ivr.get("A"), { A: "1" });
    await ivr.exit();
  }, { options: "d" }));

test("outcomes: an Asterisk before 1.8 names no file, neither one that plays nor one that is missing", () =>
  inCall(async (ivr) => {
    const prompts = [ivr.queue("long"), ivr.queue("medium")];
    await pause(100);
    const last = ivr.play("short");
    assert.deepEqual(await Promise.all([...prompts, last]), ["interrupted", "dropped", "finished"]);
    assert.equal(await ivr.play("nosuch"), "refused");
  }, { version: 1.6 }));

test("outcomes: what settles a promise on its way reaches the iterator as well", () =>
  inCall(async (ivr) => {
    const events = all(ivr);
    const queued = ivr.queue("long");
    await ivr.play("nosuch");
    await pause(100);
    await ivr.play("short");
    assert.equal(await queued, "interrupted");
    await ivr.exit();
    assert.deepEqual((await events).map(brief), ["failed", "interrupted", "finished", "exit"]);
  }));

test("autoclear: a key interrupts and clears the playlist by itself", () =>
  inCall(async (ivr) => {
    await ivr.autoclear(true);
    assert.deepEqual(await Promise.all([ivr.queue("long"), ivr.queue("medium")]), ["interrupted", "dropped"]);
    await ivr.autoclear(false);
    assert.equal(await ivr.queue("medium"), "finished");
    await ivr.exit();
  }, { caller: [[0.5, "press", "1"], [1.5, "press", "2"]] }));

// What is gathered

const presses = (keys: string, at = 0.8): CallerAction => [at, "press", keys];

/** Options, what the caller does (seconds from the call's begin), and what comes of it when. */
const GATHERS: [name: string, GatherOptions, CallerAction[], Gathered, at: number][] = [
  ["nothing", {}, [], collected("", "timeout"), 5],
  ["time to the first key", { timeout: 2000 }, [presses("1", 1.7)], collected("1", "timeout"), 3.9],
  ["time between keys", { interDigitTimeout: 1000 }, [presses("12")], collected("12", "timeout"), 2.25],
  ["so many digits", { maxDigits: 3 }, [presses("1234")], collected("123", "maxDigits"), 1.5],
  ["a terminator", {}, [presses("12#")], collected("12", "#"), 1.5],
  ["a terminator alone", {}, [presses("#")], collected("", "#"), 1],
  ["other terminators", { terminators: "*D" }, [presses("1#D")], collected("1#", "D"), 1.5],
  ["no terminator", { terminators: "", maxDigits: 2 }, [presses("#*")], collected("#*", "maxDigits"), 1.25],
  ["no time at all", { timeout: 0 }, [], collected("", "timeout"), 0],
  ["all the time", { timeout: Infinity }, [[3000, "hangup"]], collected("", "hangup"), 3000],
  ["the hangup", {}, [presses("1"), [1.5, "hangup"]], collected("1", "hangup"), 1.5],
  [
    "the clock starts behind the prompts",
    { prompt: ["medium", "short"], timeout: 1000 },
    [],
    collected("", "timeout", "finished", "finished"),
    3.5,
  ],
  ["no such prompt", { prompt: "nosuch", timeout: 1000 }, [], collected("", "timeout", "missing"), 1],
  [
    "barge-in",
    { prompt: ["medium", "long"], maxDigits: 1 },
    [presses("7")],
    collected("7", "maxDigits", "interrupted", "dropped"),
    1,
  ],
  [
    "barge-in, and time between keys",
    { prompt: "long", timeout: 700 },
    [presses("7")],
    collected("7", "timeout", "interrupted"),
    1.7,
  ],
  ["barge-in with a terminator", { prompt: "long" }, [presses("#")], collected("", "#", "interrupted"), 1],
  [
    "no barge-in: keys wait for the end of the prompts",
    { prompt: "medium", bargeIn: false, maxDigits: 2 },
    [presses("123", 0.3)],
    collected("12", "maxDigits", "finished"),
    2,
  ],
  [
    "no barge-in: time runs from there",
    { prompt: "medium", bargeIn: false, timeout: 1000 },
    [presses("1", 0.3)],
    collected("1", "timeout", "finished"),
    3,
  ],
  [
    "no barge-in: a hangup gives the keys all the same",
    { prompt: "long", bargeIn: false },
    [presses("12", 0.3), [1.5, "hangup"]],
    collected("12", "hangup", "ended"),
    1.5,
  ],
];

test("gather: collects keys as its options say, and for so long", async () => {
  for (const [name, options, caller, expected, at] of GATHERS) {
    await inCall(async (ivr, { host }) => {
      assert.deepEqual(await ivr.gather(options), expected, name);
      assertNear(host.at, at, 0.06, name);
      if (!ivr.signal.aborted) await ivr.exit();
    }, { caller });
  }
});

test("gather: keys pressed early are taken, skip the prompts, and past the end stay", () =>
  inCall(async (ivr, call) => {
    await ivr.play("medium");
    assert.deepEqual(await ivr.gather({ prompt: "long", maxDigits: 2 }), collected("12", "maxDigits"));
    assert.deepEqual(await ivr.gather({ prompt: "long" }), collected("3", "#"));
    assert.deepEqual(await next(ivr), { type: "dtmf", timestamp, digit: "4" });
    assert.equal(brief(await next(ivr)), "finished");
    await ivr.exit();
    assert.deepEqual(call.heard, ["medium"]);
  }, { epoch: timestamp - 1, caller: [[0.1, "press", "123#4"]] }));

test("gather: flush throws early keys away, and plays", () =>
  inCall(async (ivr, call) => {
    await ivr.play("short");
    const options = { prompt: "short", flush: true, timeout: 1000 };
    assert.deepEqual(await ivr.gather(options), collected("", "timeout", "finished"));
    await ivr.exit();
    assert.deepEqual(call.heard, ["short", "short"]);
  }, { caller: [[0, "press", "12"]] }));

test("gather: while it is under way keys are its own, and other events the iterator's, in order", () =>
  inCall(async (ivr) => {
    const events = all(ivr);
    assert.equal((await ivr.gather({ prompt: ["short", "short"], maxDigits: 2, timeout: 9000 })).digits, "12");
    await pause(1000);
    await ivr.exit();
    assert.deepEqual((await events).map(brief), ["finished", "finished", "3", "exit"]);
  }, { caller: [[2, "press", "123"]] }));

test("gather: a last prompt that nobody could open stops the clock for five minutes", () =>
  inCall(async (ivr, { host }) => {
    const gathered = await ivr.gather({ prompt: ["short", "broken"] });
    assert.deepEqual(gathered, collected("", "timeout", "finished", "skipped"));
    assert.equal(Math.round(host.at), 305);
    await ivr.exit();
  }, { unreadable: ["broken"] }));

test("gather: only one is under way at a time", () =>
  inCall(async (ivr) => {
    const first = ivr.gather({ timeout: 100 });
    await assert.rejects(ivr.gather(), code("invalid"));
    assert.deepEqual(await first, collected("", "timeout"));
    assert.deepEqual(await ivr.gather({ timeout: 50 }), collected("", "timeout"));
  }));

test("gather: ends when its signal aborts, with the prompts", () =>
  inCall(async (ivr, { host }) => {
    const stop = new AbortController();
    const gathering = ivr.gather({ prompt: "long", signal: stop.signal });
    await pause(100);
    stop.abort();
    assert.deepEqual(await gathering, collected("", "aborted", "interrupted"));
    await pause(50);
    assert.equal(host.playing, undefined);
    await ivr.exit();
  }));

test("gather: plays nothing when its signal was aborted before, and takes its time when it never is", () =>
  inCall(async (ivr, call) => {
    assert.deepEqual(await ivr.gather({ prompt: "long", signal: AbortSignal.abort() }), collected("", "aborted"));
    assert.deepEqual(await ivr.gather({ signal: AbortSignal.any([]), timeout: 50 }), collected("", "timeout"));
    await ivr.exit();
    assert.deepEqual(call.heard, []);
  }));

test("gather: leaves no listener at its signal", () =>
  inCall(async (ivr) => {
    const listeners = new Set<unknown>();
    const signal = Object.assign(new AbortController().signal, {
      addEventListener: (_: string, listener: unknown) => void listeners.add(listener),
      removeEventListener: (_: string, listener: unknown) => void listeners.delete(listener),
    });
    const gathering = ivr.gather({ signal, timeout: 50 });
    assert.equal(listeners.size, 1);
    await gathering;
    assert.equal(listeners.size, 0);
    await ivr.exit();
  }));

test("gather: gives the keys that came before its signal aborted", () =>
  inCall(async (ivr) => {
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 1000);
    const gathered = await ivr.gather({ prompt: "long", bargeIn: false, signal: stop.signal });
    assert.deepEqual(gathered, collected("12", "aborted", "interrupted"));
    await ivr.exit();
  }, { caller: [[0.1, "press", "12"]] }));

test("gather: a hangup is told as one, also where the session's own signal tells of it", () =>
  inCall(async (ivr) => {
    assert.deepEqual(await ivr.gather({ signal: ivr.signal }), collected("1", "hangup"));
  }, { caller: [[0.1, "press", "1"], [1, "hangup"]] }));

test("gather: with the option i a hangup ends it, and the call goes on until we end it", async () => {
  for (const end of ["hangup", "exit"] as const) {
    await inCall(async (ivr, { host }) => {
      const prompt = ivr.queue("long");
      assert.deepEqual(await ivr.gather(), collected("1", "hangup"));
      assert.ok(ivr.signal.aborted);
      await assert.rejects(ivr.gather({ prompt: "short" }), code("ended"));
      assert.equal(await ivr.play("short"), "refused");
      await ivr.set({ STILL: "here" });
      await ivr[end]();
      assert.deepEqual(await ivr.closed, { by: end });
      assert.equal(await prompt, "ended");
      assert.equal(await host.left, "hungup"); // also after an exit: the dialplan of who is gone does not go on
      assert.equal(host.variables["STILL"], "here");
    }, { options: "i", caller: [[0.5, "press", "1"], [1, "hangup"]] });
  }
});

// What goes wrong on the way

test("close: what was sent before still goes out, to a peer that reads slowly, too", async () => {
  for (const readDelay of [0, 0.3]) {
    const call = dialStreams(async (streams) => {
      const ivr = new Ivr(streams);
      for (let i = 0; i < 5; i++) ivr.set({ [`V${i}`]: "1" });
      await ivr.close();
    }, { faults: { readDelay } });
    await call.over();
    assert.equal(Object.keys(call.variables).length, 5);
  }
});

test("close: a peer that does not read holds nobody up", async () => {
  const call = dialStreams(async (streams) => {
    const ivr = new Ivr(streams);
    const pending = ivr.set({ A: "1" });
    await pause(5000);
    await ivr.close();
    await assert.rejects(pending, code("ended"));
    assert.ok(call.host.at < 6.1);
  }, { faults: { readDelay: Infinity } });
  await call.until("the handler's end", () => call.host.at > 6.5, true).catch(() => {});
  await call.hangUp();
  await call.over();
});

test("faults: a connection may be reset or end at any byte, in chunks of any size, and the call just ends", () => {
  let at = 0;
  return forAll(600, async (random) => {
    const byte = at >> 1;
    const fault = at++ % 2 ? { endAfter: byte } : { resetAfter: byte };
    const call = dialStreams(async (streams) => {
      const ivr = new Ivr(streams);
      const events = all(ivr).catch((error) => error);
      const pending = [ivr.play("long"), ivr.get("A", "B"), ivr.params(), ivr.gather({ prompt: "short" })];
      await Promise.allSettled([...pending, ivr.set({ X: "1" })]);
      if (!ivr.signal.aborted) await ivr.exit();
      const { by } = await ivr.closed;
      await events;
      await ivr.close();
      assert.ok(["exit", "caller", "disconnect"].includes(by), by);
    }, { sounds: SOUNDS, faults: { chunk: () => 1 + random.below(9), ...fault } });
    call.plan([[random.below(50) / 10, "press", "12#"]]);
    await call.over();
    assert.equal(call.clock.pending, 0);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 6. The stand-in
//
// What a real Asterisk 22 was recorded to do it does too, line by line and within 0.4 s; and what it records itself, it
// plays again.
// ---------------------------------------------------------------------------------------------------------

/** What came, without the times. */
const untimedLines = ({ received }: Recording) => received.map(([, line]) => line.replace(/^(.), *-?\d+/, "$1"));

/** What was logged, without the variables that were set. */
const logged = ({ log }: Recording) => log.map((line) => line.replace(/^CONTINUED.*/s, "CONTINUED"));

/** The same lines in the same order within 0.4 s, the same end and the same log. */
function assertSame(now: Recording, then: Recording): void {
  assert.deepEqual([untimedLines(now), logged(now)], [untimedLines(then), logged(then)]);
  const times = ({ received, ended }: Recording) => [...received, ...ended ? [ended] : []].map(([at]) => at);
  assert.equal(times(now).length, times(then).length);
  times(now).forEach((at, i) => assertNear(at, times(then)[i]!, 0.4));
  // Of the variables a live Asterisk tells those that are not empty
  const set = ({ log }: Recording) =>
    log.flatMap((line) => /^CONTINUED (.*)/s.exec(line)?.[1]?.match(/\S+=\S+/g) ?? []);
  for (const pair of set(then)) assert.ok(set(now).includes(pair), pair);
}

for (const recorded of recordings()) {
  test(`recording: ${recorded.name}`, async () => {
    assertSame(await replay(recorded), recorded);
  });
}

/** Calls of a kind that is not among the recordings. */
const CALLS: [what: string, (ivr: Ivr) => unknown, DialOptions, CallerAction[]?][] = [
  [
    "a hangup that is left to the menu",
    menu,
    { sounds: { "agent-user": 3 }, args: ["support"], options: "i" },
    [[1, "press", "1234#"], [3, "hangup"]],
  ],
  [
    "texts beyond ASCII, prompts that never begin and an Asterisk that says less",
    async (ivr) => {
      assert.deepEqual(await ivr.get("CITY"), { CITY: "Žďár" });
      await ivr.gather({ prompt: ["č", "never-begins"], maxDigits: 1 });
      assert.equal(await ivr.play("nosuch"), "refused");
      await ivr.exit("děkuji");
    },
    { sounds: (file) => file === "nosuch" ? undefined : 2, variables: { CITY: "Žďár" }, version: 1.6 },
    [[0.5, "press", "1"]],
  ],
  [
    "a channel that cannot be answered",
    (ivr) => ivr.play("beep").then(() => ivr.answer()).catch(() => ivr.exit()),
    { options: "n", answerable: false },
  ],
  [
    "a file that cannot be opened",
    (ivr) => Promise.all([ivr.queue("broken"), ivr.queue("beep")]).then(() => ivr.exit()),
    { unreadable: ["broken"] },
  ],
  ["a program that exits without a word", (ivr) => ivr.log("done"), { application: "/path/program" }],
];

for (const [what, handler, options, caller = []] of CALLS) {
  test(`recording: ${what} is recorded, and comes back the same`, async () => {
    const call = dial(handler, options);
    call.plan(caller);
    await call.over();
    const recording = call.recording();
    assertSame(await replay(recording), recording);
    assertSame(await replay(recording, handler), recording);
    assert.deepEqual(JSON.parse(JSON.stringify(recording)), recording);
  });
}

test("recording: one without an end plays to what came last, however long after the last command", async () => {
  const leave = Promise.withResolvers<void>();
  const call = dialStreams(({ writable }) => leave.promise.then(() => writable.close()), { options: "i" });
  call.plan([[10, "press", "1"], [20, "hangup"]]);
  await call.wait(30);
  const recording = call.recording();
  leave.resolve();
  await call.over();
  assert.equal(recording.ended, null);
  assert.deepEqual(untimedLines(recording), ["1", "I,HANGUP"]);
  assert.deepEqual(untimedLines(await replay(recording)), untimedLines(recording));
});

/** A call to be played, of which nothing is known yet but what is given. */
function scenario(given: Partial<Recording>): Recording {
  const nothing = { args: [], options: "", variables: {}, globals: {}, caller: [], steps: [], received: [], log: [] };
  return { application: "ivr://localhost", sounds: SOUNDS, ended: [0, "end"], ...nothing, ...given };
}

test("stand-in: half a line holds everything back, until its other half or the end comes", async () => {
  const came = await replay(scenario({
    steps: [[0, "V,A=1"], [1, "2\n"], [2, "X,bye"], [2, null]],
    caller: [[0.1, "press", "1"]],
  }));
  assert.deepEqual(untimedLines(came), ["1"]);
  assert.ok(came.received[0]![0] >= 1);
  assert.equal(came.log.at(-2), "CONTINUED A=12");
});

test("stand-in: a key that is pressed while a D goes on is lost", async () => {
  const caller: CallerAction[] = [[0.2, "press", "2"], [1, "press", "3"]];
  assert.deepEqual(untimedLines(await replay(scenario({ steps: [[0, "D,12\n"], [2, null]], caller }))), ["3"]);
});

test("stand-in: without silence/10 nothing plays but what is queued before the first silence", async () => {
  const table: [options: string, steps: Recording["steps"], received: string[]][] = [
    ["", [[0.3, "A,short\n"], [1, "A,beep\n"], [1.3, "S,beep\n"], [1.6, "I,x\n"]], ["D,short", "D,beep", "D,beep"]],
    ["n", [[0.3, "T,x\nA,short\n"], [0.301, "\n"], [1, "A,beep\n"], [1.3, "S,short\n"]], ["F,short", "D,beep"]],
  ];
  for (const [options, steps, received] of table) {
    const call = scenario({ options, steps: [...steps, [2, "H,done\n"]], unreadable: ["silence/10"] });
    const now = await replay(call);
    assert.deepEqual(untimedLines(now), [...received, "H"]);
    assert.deepEqual(now.log, ["File 'silence/10' could not be opened", "Hanging up: done", "HUNGUP"]);
  }
});

/** Texts of the dialplan, and what Asterisk makes of them. */
const DIALPLANS: [string, application: string, args: string[], options: string][] = [
  ["ivr://localhost", "ivr://localhost", [], ""],
  ["ivr://localhost,i", "ivr://localhost", [], "i"],
  ["ivr://[::1]:2949(arg1,arg2),ni", "ivr://[::1]:2949", ["arg1", "arg2"], "ni"],
  ["/usr/bin/menu.ts()", "/usr/bin/menu.ts", [], ""],
  ["/usr/bin/menu.ts(a b,,c)", "/usr/bin/menu.ts", ["a b", "", "c"], ""],
  ['/bin/x("a,b",c\\,d,(e,f),[g,h])', "/bin/x", ["a", "b", "c", "d", "(e,f)", "[g,h]"], ""],
];

test("stand-in: the dialplan's text is read as Asterisk reads it, and what it would not run is refused", () => {
  for (const [text, application, args, options] of DIALPLANS) {
    assert.deepEqual(parseDialplan(text), { application, args, options });
  }
  for (const text of ["", ",n", "/bin/x(a", "/bin/x,q", "(a)"]) assert.throws(() => parseDialplan(text), SyntaxError);
});

/** An application that writes anything at any time, and is told events. */
const scribbler = (random: Random) => async ({ readable, writable }: Streams) => {
  const writer = writable.getWriter();
  const got = all(lines(readable));
  for (let i = 0; i < 20; i++) {
    const text = random.text([...AWKWARD, "\n", "\n", "\n", ..."SAIDOVGPLTX", "x".repeat(700)], 10);
    await writer.write(utf8(text)).catch(() => {});
    if (random.below(2)) await pause(random.below(500));
  }
  await writer.close().catch(() => {});
  for (const line of await got) assert.notEqual(parseEvent(line).type, "unknown", line);
};

test("stand-in: whatever bytes come in whatever chunks, it tells events, and the call ends", () =>
  forAll(200, async (random) => {
    const options = random.of(["", "n", "i", "d"]);
    const call = dialStreams(scribbler(random), { sounds: SOUNDS, options, version: random.of([22, 13, 1.6]) });
    call.plan([[random.below(5000) / 1000, "press", "123"], [random.below(5000) / 1000, "hangup"]]);
    await call.over();
    assert.equal(call.clock.pending, 0);
  }));

// ---------------------------------------------------------------------------------------------------------
// 7. The test kit
//
// A call goes on in a time of its own, with a caller who does what callers can. A script that cannot go on fails at once,
// and shows the call. A live call that is tapped becomes such a call.
// ---------------------------------------------------------------------------------------------------------

test("kit: a caller does only what callers can", async () => {
  const call = dial((ivr) => ivr.gather({ maxDigits: 2 }));
  assert.throws(() => call.plan([[1, "hang up"]] as never), TypeError);
  await assert.rejects(call.press("x"), TypeError);
  await call.press("a1");
  await call.over();
  const did = call.notes.filter(({ kind }) => kind === "caller").map(({ text }) => text);
  assert.deepEqual(did, ["presses A", "presses 1"]);
});

/** Waits and presses three times, and hangs up. */
async function assertPresses(call: Call, random: Random): Promise<void> {
  for (let times = 0; times < 3; times++) {
    await call.wait(random.below(9_000_000) / random.of([1e6, 7e6, 2 ** 20]));
    const began = Math.round(call.host.at * 1e6);
    const keys = random.text("0123456789*#ABCD", 6) || "1";
    await call.press(keys);
    assert.equal(call.host.at, (began + 200_000 + (keys.length - 1) * 250_000) / 1e6);
    const pressed = call.notes.filter(({ kind }) => kind === "caller").slice(-keys.length);
    assert.equal(pressed.map(({ text }) => text.at(-1)).join(""), keys);
    assert.equal(pressed.at(-1)!.at, call.host.at);
  }
  await call.hangUp();
  await call.over();
}

test("kit: press returns when its last key was pressed, whenever it began and whoever shares its time", () =>
  forAll(250, async (random) => {
    const clock = new VirtualClock();
    const gather = (ivr: Ivr) => ivr.gather({ terminators: "", timeout: Infinity });
    const calls = Array.from({ length: 1 + random.below(6) }, () => dial(gather, { clock }));
    await Promise.all(calls.map((call) => assertPresses(call, random)));
    assert.equal(clock.pending, 0);
  }));

test("kit: keys that two callers press at once are pressed when each press returns", async () => {
  const clock = new VirtualClock();
  const calls = [1, 2].map(() => dial((ivr) => ivr.gather({ maxDigits: 1 }), { clock }));
  await Promise.all(calls.map(async (call) => {
    await call.press("5");
    assert.ok(call.notes.some(({ kind, text }) => kind === "caller" && text === "presses 5"));
  }));
  await Promise.all(calls.map((call) => call.over()));
});

test("kit: calls can share one time", async () => {
  const clock = new VirtualClock();
  const calls = [1, 2].map((i) =>
    dial(async (ivr) => {
      await ivr.play("beep");
      await ivr.set({ I: `${i}` });
      await ivr.exit();
    }, { clock })
  );
  await Promise.all(calls.map((call) => call.over()));
  assert.deepEqual(calls.map(({ variables }) => variables["I"]), ["1", "2"]);
});

test("kit: a handler's timers run in the call's time, of which minutes are over at once", async () => {
  const began = performance.now();
  const ticks: number[] = [];
  const call = dial(async (ivr) => {
    const every = setInterval(() => ticks.push(call.host.at), 60_000);
    clearTimeout(setTimeout(() => assert.fail(), 1000));
    assert.equal(await new Promise((resolve) => setTimeout(resolve, 299_000, "arg")), "arg");
    clearInterval(every);
    await ivr.exit();
  });
  await call.over();
  assertNear(call.host.at, 299, 0.01);
  assert.deepEqual(ticks.map(Math.round), [60, 120, 180, 240]);
  assert.ok(performance.now() - began < 5000);
});

test("kit: everybody else's timers stay real, and the global functions come back when the call is over", async () => {
  const { setTimeout: own, clearTimeout: ownClear } = globalThis;
  let rang = false;
  const before = setTimeout(() => rang = true, 100_000);
  const call = dial(async (ivr) => {
    await pause(300_000);
    await ivr.exit();
  });
  const meanwhile = setTimeout(() => rang = true, 100_000);
  await call.over();
  clearTimeout(meanwhile);
  clearTimeout(before);
  assert.equal(rang, false);
  assert.equal(globalThis.setTimeout, own);
  assert.equal(globalThis.clearTimeout, ownClear);
});

test("kit: the clock waits for what is held", async () => {
  const call: Call = dial(async (ivr) => {
    const outside = new Promise<string>((resolve) => setImmediate(() => setImmediate(resolve, "real")));
    await ivr.set({ ANSWER: await call.clock.hold(outside) });
    assert.ok(call.host.at < 0.01);
    await ivr.exit();
  });
  await call.over();
  assert.equal(call.variables["ANSWER"], "real");
});

test("kit: a program has a stderr, and exits when its handler is done", async () => {
  const call = dialStreams(async ({ stderr }) => {
    await stderr!.getWriter().write(utf8("warning: ž\nTrace\n"));
  }, { application: "/path/program" });
  assert.equal(await call.over(), "hungup");
  assert.deepEqual(call.log, ["stderr: warning: ž", "stderr: Trace", "Child process went away"]);
});

test("kit: a server has no stderr, and its call ends with its stream", async () => {
  const call = dialStreams(async ({ stderr, writable }) => {
    assert.equal(stderr, undefined);
    await writable.close();
  });
  assert.equal(await call.over(), "hungup");
});

/** How a step of a script failed. */
async function failure(step: Promise<unknown>): Promise<CallError> {
  const error = await step.catch((error) => error);
  assert.ok(error instanceof CallError);
  return error;
}

test("kit: a script that waits for what never comes fails at once, with the transcript", async () => {
  const call = dial(async (ivr) => {
    await ivr.play("beep");
    await ivr.gather({ timeout: Infinity });
  });
  const { message, stack } = await failure(call.hears("thank-you"));
  assert.match(message, /^Waited for "thank-you" to play, but nothing more can happen .*hold\)\n/);
  assert.match(message, /^ +0\.\d{3} +--> +S,beep$/m);
  assert.match(message, /^ +1\.\d{3} +<-- +F,\d+,beep$/m);
  assert.doesNotMatch(message, /EIVR_ACK/);
  assert.match(stack!, /protocol_test/);
  await call.hangUp();
  await call.over();
});

test("kit: a step of a script takes an hour of the call's time at most", async () => {
  const call = dial(async (ivr) => {
    const every = setInterval(() => {}, 60_000);
    await ivr.closed;
    clearInterval(every);
  });
  await failure(call.hears("thank-you"));
  assert.ok(call.host.at > 3500 && call.host.at <= 3600);
  await call.hangUp();
  await call.over();
});

test("kit: a script that waits for more when the call is over fails, and one that waits for its end does not", async () => {
  const call = dial((ivr) => ivr.gather({ timeout: Infinity }));
  await call.hangUp();
  assert.match((await failure(call.hears("thank-you"))).message, /the call is over/);
  assert.equal(await call.over(), "hungup");
});

test("kit: a handler that fails is told by the step under way, and by the end", async () => {
  const broken = new Error("no such account");
  const call = dial(async (ivr) => {
    await ivr.play("beep");
    throw broken;
  });
  assert.equal((await failure(call.hears("thank-you"))).cause, broken);
  await assert.rejects(call.over(), broken);
});

test("kit: a handler that is done and has not ended the call is an error", async () => {
  const call = dialStreams(() => {});
  await failure(call.over());
  await call.hangUp();
  await call.over();
});

test("kit: a transcript is printed once, and nothing from the wire moves the cursor or turns the writing", async () => {
  const call = dial(async (ivr) => {
    await ivr.log("J\u202eno\u2028\x9b2J");
    await ivr.get("NAME");
    throw new Error("no \x1b[2J");
  }, { variables: { NAME: "\x1b[2J\u200f" } });
  const error = await failure(call.hears("\u061c"));
  for (const text of [error.message, error.stack!]) {
    assert.doesNotMatch(text.replaceAll("\n", ""), /[\p{Cc}\p{Bidi_Control}\u2028]/u);
  }
  assert.equal(inspect(error).split("J\\u202eno\\u2028").length, 3); // the command, the log
  assert.match(error.message, /^Waited for "\\u061c" to play, but the handler failed: Error: no \\x1b\[2J\n/);
  assert.match(error.message, /--> L,J\\u202eno\\u2028 2J\n/);
  assert.match(error.message, /NAME=\\x1b\[2J\\u200f\n?/);
  await assert.rejects(call.over(), /no/);
});

/** Sounds of many lengths, and one that is missing. */
const sundry = (file: string) => file === "digits/2" ? undefined : 0.3 + file.length / 5;

/** A caller who presses anything, each time so many seconds after the last or up to three more, and perhaps hangs up. */
function randomCaller(random: Random, rest: number): CallerAction[] {
  const caller: CallerAction[] = [];
  for (let at = 0.3 * rest; caller.length < 5; at += rest + random.below(3000) / 1000) {
    caller.push([at, "press", random.text("0123456789*#ABCD", 5) || "1"]);
  }
  if (random.below(2)) caller.push([random.below(20_000) / 1000, "hangup"]);
  return caller;
}

/** All that a tap can know of a call, but times. */
const known = (recording: Recording) => [
  recording.received.map(([, line]) => line),
  recording.steps.map(([, text]) => text).join("").trimEnd(),
  [recording.application, recording.args, recording.variables],
  logged(recording).filter((line) => !/^Queue|^Option/.test(line)),
];

test("tap: what passes is recorded as the kit records it, and plays again as it was", () =>
  forAll(40, async (random) => {
    let tapped!: Tapped;
    const call = dialStreams((streams) => {
      tapped = tap(streams, { now: () => call.host.at * 1000 });
      return answer(tapped, menu);
    }, {
      application: "ivr://there",
      args: random.of([[], ["sales"], ["support", "é"]]),
      options: random.of(["", "i"]),
      sounds: sundry,
    });
    call.plan(randomCaller(random, 2));
    await call.over();
    const now = tapped.recording();
    assert.deepEqual(known(now), known(call.recording()));
    assert.deepEqual(JSON.parse(JSON.stringify(now)), now);
    // A key in the moment when a prompt ends may come before that or behind it
    const ends = now.received.filter(([, line]) => line.startsWith("F")).map(([at]) => at);
    if (now.caller.some(([at]) => ends.some((end) => Math.abs(at + 0.2 - end) < 0.2))) return;
    const again = await replay(now, menu);
    assert.deepEqual(untimedLines(again), untimedLines(now));
    assert.deepEqual(known(again)[3], known(now)[3]);
  }));

test("tap: keys that were sent are in the log, with the times that Asterisk takes them to have", async () => {
  const sends = async (ivr: Ivr) => {
    await ivr.sendDtmf("12");
    await ivr.sendDtmf("w3", { interval: 100, duration: 50 });
    await ivr.sendDtmf("4", { interval: 0 });
    await ivr.exit();
  };
  let tapped!: Tapped;
  const call = dialStreams((streams) => {
    tapped = tap(streams, { now: () => call.host.at * 1000 });
    return answer(tapped, sends);
  });
  await call.over();
  const now = tapped.recording();
  assert.deepEqual(now.log.slice(0, 3), ["12 250 0", "w3 100 50", "4 250 0"].map((sent) => `Sending DTMF: ${sent}`));
  assert.deepEqual((await replay(now, sends)).log, now.log);
});

/** A call in which secrets pass in every way, as it is tapped. */
async function secretive(options: Parameters<typeof tap>[1]): Promise<Recording> {
  let tapped!: Tapped;
  const call = dialStreams((streams) => {
    tapped = tap(streams, { now: () => 0, ...options });
    return answer(tapped, async (ivr) => {
      await ivr.params();
      const { NAME } = await ivr.get("NAME");
      const { digits } = await ivr.gather({ maxDigits: 8 });
      assert.equal(digits, "12345678");
      await ivr.set({ ACCOUNT: digits, OTHER: NAME! });
      await ivr.log(`account ${digits} of ${NAME}`);
      await ivr.sendDtmf("5678");
      await ivr.send({ type: "unknown", line: `Q,${NAME}` });
      await ivr.exit(`account ${digits}`);
    });
  }, { variables: { NAME: "Alice Žižková" }, args: ["secret argument"], epoch: 1 });
  call.plan([[0.5, "press", "12345678"]]);
  await call.over();
  return tapped.recording();
}

test("tap: without values nothing of them is left", async () => {
  const written = JSON.stringify(await secretive({ values: false }));
  for (const secret of ["12345678", "5678", "1234", "Alice", "secret argument", "account"]) {
    assert.ok(!written.includes(secret), `${secret} in ${written}`);
  }
  assert.match(written, /"V,ACCOUNT=x{8},OTHER=x+\\n/);
});

test("tap: what is beyond its bound is not recorded, nor is an end", async () => {
  const { received, steps, ended } = await secretive({ most: 100 });
  assert.ok(JSON.stringify([received, steps]).length < 1000);
  assert.equal(ended, null);
});

test("tap: a stream that breaks is an end", async () => {
  const broken = new ReadableStream<Uint8Array>({ start: (controller) => controller.error(new Error("reset")) });
  const tapped = tap({ readable: broken, writable: new WritableStream() });
  assert.equal((await answer(tapped, async () => {})).by, "disconnect");
  assert.notEqual(tapped.recording().ended, null);
});

// ---------------------------------------------------------------------------------------------------------
// 8. The menu, and what is said
//
// Whatever a caller does, the menu's call ends as they end it. Numbers, letters and times are said as Asterisk says them.
// ---------------------------------------------------------------------------------------------------------

test("a caller with an account chooses the support", async () => {
  const call = dial(menu, { args: ["sales"], sounds: { "agent-user": 4, "vm-press": 1, "auth-thankyou": 2 } });
  await call.hears("agent-user");
  await call.press("1234#");
  await call.hears("vm-press");
  await call.press("2");
  await call.hears("auth-thankyou");
  assert.equal(await call.over(), "continued");
  assert.deepEqual(call.variables, { ACCOUNT: "1234", DEPARTMENT: "support" });
});

test("a caller who hangs up", async () => {
  const call = dial(menu, { variables: { CITY: "Brno" } });
  await call.hears("agent-user");
  await call.wait(2);
  await call.hangUp();
  assert.equal(await call.over(), "hungup");
  assert.equal(call.variables.ACCOUNT, undefined);
});

test("readme: the tests that it shows are the two above", () => {
  const read = (name: string) => readFileSync(new URL(name, import.meta.url), "utf8");
  const [, shown] = /examples\/menu\.ts";\n\n([^]*?)```/.exec(read("README.md"))!;
  assert.ok(read("protocol_test.ts").includes(shown!));
});

test("menu: type-ahead skips the prompts", async () => {
  const call = dial(menu);
  call.plan([[0, "press", "1234#1"]]);
  await call.over();
  assert.deepEqual(call.variables, { ACCOUNT: "1234", DEPARTMENT: "sales" });
});

test("menu: a bad number is asked for again", async () => {
  const call = dial(menu, { args: ["support"] });
  await call.hears("agent-user");
  await call.press("12#");
  await call.hears("pbx-invalid");
  await call.hears("agent-user");
  await call.press("98765432");
  await call.over();
  assert.deepEqual(call.variables, { ACCOUNT: "98765432", DEPARTMENT: "support" });
});

test("menu: silence is asked three times, and goes on with the default", async () => {
  const call = dial(menu, { args: ["support"] });
  await call.over();
  assert.deepEqual(call.heard, Array(3).fill(["hello-world", "agent-user"]).flat());
  assert.deepEqual(call.variables, { DEPARTMENT: "support" });
});

test("menu: a hundred random conversations each end as their caller ended them, and leave no timer", () =>
  forAll(100, async (random) => {
    let ending: Ending | undefined;
    const options = random.of(["", "", "i", "n"]);
    const call = dialStreams(async (streams) => ending = await answer(streams, menu), {
      options,
      sounds: sundry,
      unreadable: random.of([[], ["vm-press"]]),
      version: random.of([22, 16, 13]),
      faults: { chunk: () => 1 + random.below(random.of([1, 5, 100])) },
    });
    call.plan(randomCaller(random, 0));
    const left = await call.over();
    assert.equal(call.clock.pending, 0);
    const hungUp = call.notes.some(({ kind, text }) => kind === "caller" && text === "hangs up");
    assert.equal(left, hungUp ? "hungup" : "continued");
    assert.deepEqual(ending, { by: !hungUp || options === "i" ? "exit" : "caller" });
  }));

const MARKS = "letters/exclaimation-point pound letters/dollar star letters/plus " +
  "letters/dash letters/dot letters/slash letters/equals letters/at";

/** Applications of the dialplan, and what a live Asterisk played for them: without `digits/` where they begin with it. */
const SAID: [application: string, played: string][] = [
  ["SayNumber(0)", "0"],
  ["SayNumber(7)", "7"],
  ["SayNumber(13)", "13"],
  ["SayNumber(20)", "20"],
  ["SayNumber(21)", "20 1"],
  ["SayNumber(99)", "90 9"],
  ["SayNumber(100)", "1 hundred"],
  ["SayNumber(101)", "1 hundred 1"],
  ["SayNumber(110)", "1 hundred 10"],
  ["SayNumber(999)", "9 hundred 90 9"],
  ["SayNumber(1000)", "1 thousand"],
  ["SayNumber(1001)", "1 thousand 1"],
  ["SayNumber(1234)", "1 thousand 2 hundred 30 4"],
  ["SayNumber(10010)", "10 thousand 10"],
  ["SayNumber(999999)", "9 hundred 90 9 thousand 9 hundred 90 9"],
  ["SayNumber(1000000)", "1 million"],
  ["SayNumber(1000100)", "1 million 1 hundred"],
  ["SayNumber(-5)", "minus 5"],
  ["SayNumber(-1000000000)", "minus 1 billion"],
  ["SayNumber(2147483646)", "2 billion 1 hundred 40 7 million 4 hundred 80 3 thousand 6 hundred 40 6"],
  ["SayNumber(-2147483646)", "minus 2 billion 1 hundred 40 7 million 4 hundred 80 3 thousand 6 hundred 40 6"],
  ["SayOrdinal(1)", "h-1"],
  ["SayOrdinal(12)", "h-12"],
  ["SayOrdinal(20)", "h-20"],
  ["SayOrdinal(21)", "20 h-1"],
  ["SayOrdinal(100)", "1 h-hundred"],
  ["SayOrdinal(101)", "1 hundred h-1"],
  ["SayOrdinal(1000)", "1 h-thousand"],
  ["SayOrdinal(1100)", "1 thousand 1 h-hundred"],
  ["SayOrdinal(2000000)", "2 h-million"],
  ["SayOrdinal(-30)", "minus h-30"],
  ["SayDigits(0123456789)", "0 1 2 3 4 5 6 7 8 9"],
  ["SayDigits(12*#)", "1 2 star pound"],
  ["SayDigits(-5)", "minus 5"],
  ["SayDigits(+1 (2) b)", "1 2"],
  ["SayDigits(A)", ""],
  ["SayAlpha(a1 .)", "letters/a 1 letters/space letters/dot"],
  ["SayAlpha(Zed)", "letters/z letters/e letters/d"],
  ["SayAlpha(!#$*+-./=@)", MARKS],
  [
    "SayAlpha(%&'(),:;)",
    "letters/ascii37 letters/ascii38 letters/ascii39 letters/ascii40 letters/ascii41 letters/ascii44 letters/ascii58 letters/ascii59",
  ],
  [
    "SayAlpha(<>?[\\]^_`)",
    "letters/ascii60 letters/ascii62 letters/ascii63 letters/ascii91 letters/ascii92 letters/ascii93 letters/ascii94 letters/ascii95 letters/ascii96",
  ],
  ["SayAlpha({|}~)", "letters/ascii123 letters/ascii124 letters/ascii125 letters/ascii126"],
  ["SayAlpha(a\té)", "letters/a"],
  ["SayPhonetic(AZ az)", "phonetic/a_p phonetic/z_p letters/space phonetic/a_p phonetic/z_p"],
  ["SayPhonetic(0189)", "0 1 8 phonetic/9_p"],
  ["SayPhonetic(!#$*+-./=@)", MARKS],
  ["SayPhonetic(_a)", "phonetic/a_p"],
  ["SayUnixTime(0,UTC,IMp)", "12 oclock a-m"],
  ["SayUnixTime(1751630759,UTC,IMp)", "12 oh 5 p-m"],
  ["SayUnixTime(1751631000,Europe/Prague,IMp)", "2 10 p-m"],
  ["SayUnixTime(1764116760,Europe/Prague,IMp)", "1 20 6 a-m"],
  ["SayUnixTime(1751652900,Asia/Kolkata,IMp)", "11 40 5 p-m"],
  ["SayUnixTime(-2177409600,UTC,ABdY)", "day-2 mon-0 h-1 19 oh 1"],
  ["SayUnixTime(946681140,Europe/Prague,ABdY)", "day-5 mon-11 30 h-1 19 90 9"],
  ["SayUnixTime(946681200,Europe/Prague,ABdY)", "day-6 mon-0 h-1 2 thousand"],
  ["SayUnixTime(1709208000,UTC,ABdY)", "day-4 mon-1 20 h-9 2 thousand 20 4"],
  ["SayUnixTime(4107549600,America/New_York,ABdY)", "day-0 mon-1 20 h-8 2 thousand 1 hundred"],
  ["SayUnixTime(-1867320000,UTC,ABdY)", "day-0 mon-9 h-30 19 10"],
  ["SayUnixTime(1774745999,Europe/Prague)", "day-0 mon-2 20 h-9 2 thousand 20 6 at 1 50 9 a-m"],
  ["SayUnixTime(1774746000,Europe/Prague)", "day-0 mon-2 20 h-9 2 thousand 20 6 at 3 oclock a-m"],
  ["SayUnixTime(2147483648,UTC)", "day-2 mon-0 h-19 2 thousand 30 8 at 3 14 a-m"],
];

/** What the module has Asterisk play instead of an application. */
function said(application: string): string[] {
  const [, name, text] = /^Say(\w+)\((.*)\)$/s.exec(application)!;
  if (name === "Number") return say.number(Number(text));
  if (name === "Ordinal") return say.ordinal(Number(text));
  if (name === "Digits") return say.digits(text!);
  if (name === "Alpha") return say.alpha(text!);
  if (name === "Phonetic") return say.phonetic(text!);
  const [epoch, zone, format] = text!.split(",");
  const sayTime = format === "IMp" ? say.time : format === "ABdY" ? say.date : say.dateTime;
  return sayTime(new Date(Number(epoch) * 1000), zone);
}

test("say: the files are those that a live Asterisk played", () => {
  for (const [application, played] of SAID) {
    assert.equal(said(application).map((file) => file.replace(/^digits\//, "")).join(" "), played, application);
  }
});

test("say: the files are a prompt like any other", async () => {
  const prompt = ["vm-youhave", ...say.number(1234)];
  const call = dial(async (ivr) => {
    assert.equal((await ivr.gather({ prompt, maxDigits: 1 })).digits, "5");
  }, { sounds: Object.fromEntries(prompt.map((file) => [file, 1])) });
  for (const file of prompt) await call.hears(file);
  await call.press("5");
  await call.over();
});

const LARGEST = 2 ** 31 - 2;

/** A whole number of any size that can be said. */
function sayable(random: Random): number {
  const size = Math.min(10 ** (1 + random.below(10)), LARGEST + 1);
  return random.below(size) * random.of([1, -1]) + 0;
}

test("say: whoever hears a number knows it, and its ordinal is the same with another end", () =>
  forAll(2000, (random) => {
    const value = sayable(random);
    const scales: Record<string, number> = { thousand: 1e3, million: 1e6, billion: 1e9 };
    let total = 0, group = 0;
    for (const file of say.number(value)) {
      const word = file.replace("digits/", "");
      if (word in scales) [total, group] = [total + group * scales[word]!, 0];
      else if (word === "hundred") group *= 100;
      else if (word !== "minus") group += Number(word);
    }
    assert.equal(total + group, Math.abs(value));
    assert.equal(say.number(value)[0] === "digits/minus", value < 0);
    if (value) {
      assert.deepEqual(say.ordinal(value).map((file) => file.replace("/h-", "/")), say.number(value));
    }
  }));

test("say: every character of ASCII has one file, in either case", () => {
  for (let code = 32; code < 127; code++) {
    const character = String.fromCharCode(code);
    assert.equal(say.alpha(character).length, 1, character);
    assert.deepEqual(say.alpha(character.toLowerCase()), say.alpha(character.toUpperCase()));
    assert.equal(say.phonetic(character).length, /[a-z\d !#$*+\-./=@]/i.test(character) ? 1 : 0, character);
    assert.equal(say.digits(character).length, /[\d*#-]/.test(character) ? 1 : 0, character);
  }
  assert.deepEqual(say.alpha("\0\x1f\x7fé𝄞\u212a\u017f"), []);
});

test("say: a time is that of its zone, and without one that of the system's", () => {
  assert.deepEqual(say.dateTime(new Date("1900-12-31T15:00Z"), "Etc/GMT-9"), said("SayUnixTime(-2177452800,UTC)"));
  return forAll(100, (random) => {
    const when = new Date((random.below(200 * 365 * 1440) - 69 * 365 * 1440) * 60_000);
    const there = new Date(when.getTime() - 5 * 3600_000);
    assert.deepEqual(say.dateTime(when, "Etc/GMT+5"), say.dateTime(there, "UTC"));
    assert.deepEqual(say.dateTime(when, "UTC"), [...say.date(when, "UTC"), "digits/at", ...say.time(when, "UTC")]);
    assert.deepEqual(say.dateTime(when), say.dateTime(when, Intl.DateTimeFormat().resolvedOptions().timeZone));
  });
});

const WHOLE = "it has to be a whole number from -2147483646 to 2147483646";
const EARLY = "it has to be a time from 1901 on";

/** What cannot be said, and what the error tells. */
const UNSAYABLE: [speak: () => string[], typeof RangeError, ...texts: string[]][] = [
  ...[1.5, NaN, Infinity, LARGEST + 1, -LARGEST - 1].flatMap((value): typeof UNSAYABLE => [
    [() => say.number(value), RangeError, `Cannot say ${value}: ${WHOLE}`],
    [() => say.ordinal(value), RangeError, `Cannot say ${value}: ${WHOLE}`],
  ]),
  [() => say.ordinal(0), RangeError, "Cannot say 0 as an ordinal: "],
  [() => say.number("5" as never), TypeError, 'Cannot say "5": it has to be a number'],
  [() => say.number(undefined as never), TypeError, "Cannot say undefined: it has to be a number"],
  ...[say.digits, say.alpha, say.phonetic].map((spell): typeof UNSAYABLE[number] => [
    () => spell(5 as never),
    TypeError,
    "Cannot say 5: it has to be a string",
  ]),
  ...[say.time, say.date, say.dateTime].flatMap((sayTime): typeof UNSAYABLE => [
    [() => sayTime(5 as never, "UTC"), TypeError, "Cannot say 5: it has to be a Date"],
    [() => sayTime({} as never, "UTC"), TypeError, "it has to be a Date"],
    [() => sayTime(new Date(NaN), "UTC"), RangeError, `Cannot say Invalid Date: ${EARLY}`],
    [() => sayTime(new Date(-1e13), "UTC"), RangeError, `Cannot say ${new Date(-1e13)}: ${EARLY}`],
    [() => sayTime(new Date("1900-12-31T23:59:59Z"), "UTC"), RangeError, EARLY],
    [() => sayTime(new Date("1901-01-01T04:00Z"), "America/New_York"), RangeError, EARLY],
    [() => sayTime(new Date("-002025-07-04T12:00Z"), "UTC"), RangeError, EARLY],
    [() => sayTime(new Date(0), "Nowhere/Land"), RangeError, "Nowhere/Land"],
  ]),
];

test("say: what cannot be said is an error that names it and the rule", () => {
  for (const [speak, type, ...texts] of UNSAYABLE) {
    assert.throws(speak, (error) => {
      assert.ok(error instanceof type);
      for (const text of texts) assert.ok(error.message.includes(text), error.message);
      return true;
    });
  }
});

// ---------------------------------------------------------------------------------------------------------
// 9. Over TCP, over pipes, and through the telephone: the wall's time, and little of it
//
// Calls at once, resets and floods stay each call's own. The menu is a program and a server, which the telephone calls.
// ---------------------------------------------------------------------------------------------------------

/**
 * A test of programs, which take their time: Bun gives other tests five seconds. Windows has neither signals nor files that
 * run by their first line, and no Asterisk.
 */
function onUnix(name: string, body: () => Promise<void>): void {
  test(name, { skip: process.platform === "win32", timeout: 120_000 }, body);
}

/** Waits until something holds. */
async function until(holds: () => unknown, seconds = 60): Promise<void> {
  for (const end = performance.now() + seconds * 1000; !await holds();) {
    assert.ok(performance.now() < end, `this did not hold for ${seconds} s: ${holds}`);
    await pause(10);
  }
}

/** A server on a port of its own. */
async function listening(server: Server) {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const close = () => new Promise<void>((resolve) => server.close(() => resolve()));
  return { port: (server.address() as AddressInfo).port, close, [Symbol.asyncDispose]: close };
}

/** A server of a handler's. Its end tells what the handlers threw, but for calls that ended. */
async function served(handler: (ivr: Ivr) => Promise<unknown>) {
  const calls: Promise<unknown>[] = [];
  const endings: string[] = [];
  const { port, close } = await listening(createServer({ noDelay: true, allowHalfOpen: true }, (socket) => {
    const ivr = new Ivr(nodeStreams(socket, socket));
    ivr.closed.then(({ by }) => endings.push(by));
    calls.push(handler(ivr).catch((error) => error).finally(() => ivr.close()));
  }));
  return {
    port,
    endings,
    close: async () => {
      const errors = await Promise.all(calls);
      await close();
      for (const error of errors) {
        if (error instanceof Error && !(error instanceof IvrError && error.code === "ended")) throw error;
      }
    },
  };
}

/** A connection as Asterisk makes it. */
const dialed = (port: number, allowHalfOpen = false) =>
  connect({ port, host: "127.0.0.1", noDelay: true, allowHalfOpen });

/** What comes over a connection until it is closed, also by a reset. */
function ended(socket: Socket): Promise<string> {
  let came = "";
  socket.on("error", () => {}).on("data", (data) => came += data.toString("latin1"));
  return new Promise((resolve) => socket.on("close", () => resolve(came)));
}

/** The stand-in, connected to a port. */
async function standIn(port: number, options: ConstructorParameters<typeof Asterisk>[1]): Promise<Asterisk> {
  const socket = dialed(port, true);
  await new Promise((resolve) => socket.once("connect", resolve));
  return new Asterisk(Duplex.toWeb(socket), options);
}

/** Its caller presses keys all at once. */
function press(host: Asterisk, keys: string): void {
  for (const key of keys) host.press(key as "1");
}

/** Twenty commands at once, a prompt and the end. */
async function burst(ivr: Ivr): Promise<void> {
  const began = performance.now();
  await Promise.all(Array.from({ length: 20 }, (_, i) => ivr.set({ [`V${i}`]: "1" })));
  if (performance.now() - began > 2000) throw new Error("stalled");
  await ivr.gather({ prompt: "beep", maxDigits: 2, timeout: 20 });
  await ivr.exit();
}

test("tcp: bursts of many calls are acknowledged, and each call ends as its caller ends it", async () => {
  const server = await served(burst);
  const hosts = await Promise.all(Array.from({ length: 20 }, async (_, i) => {
    const host = await standIn(server.port, { sounds: { beep: 0.02 } });
    if (i % 4 === 1) setTimeout(() => host.hangUp(), i);
    if (i % 4 === 2) host.press("1");
    return host;
  }));
  const left = await Promise.all(hosts.map((host) => host.left));
  await server.close();
  assert.deepEqual(left, hosts.map((_, i) => i % 4 === 1 ? "hungup" : "continued"));
  assert.deepEqual(server.endings.sort(), [...Array(5).fill("caller"), ...Array(15).fill("exit")]);
});

test("tcp: a peer that is no Asterisk at all is no other call's failure", async () => {
  const server = await served(burst);
  const host = await standIn(server.port, { sounds: { beep: 0.02 } });
  const noise = dialed(server.port);
  noise.end("\xff\n".repeat(20_000));
  await ended(noise);
  assert.equal(await host.left, "continued");
  await server.close();
  assert.deepEqual(server.endings.sort(), ["disconnect", "exit"]);
});

test("tcp: the caller's hangup is not lost to the reset that comes with it", async () => {
  const server = await served(async (ivr) => {
    for (;;) {
      ivr.log("x".repeat(100));
      await ivr.set({ A: "1".repeat(200) });
    }
  });
  for (let i = 0; i < 100; i++) {
    const socket = dialed(server.port).on("error", () => {});
    await new Promise<void>((resolve) => {
      socket.on("close", () => resolve()).once("readable", () => {
        socket.read(10); // the rest stays unread, which makes the close a reset
        socket.write("H,1795372496\n", () => socket.destroy());
      });
    });
  }
  await server.close();
  assert.equal(server.endings.length, 100);
  assert.ok(server.endings.filter((by) => by === "caller").length >= 98, server.endings.join(" "));
  assert.ok(!server.endings.includes("error"));
});

test("tcp: a session that overflows breaks off its own connection, and nothing else", async () => {
  const server = await served(async (ivr) => {
    assert.ok(code("overflow")((await ivr.closed).error));
  });
  const socket = dialed(server.port);
  socket.write("1,1\n".repeat(300_000));
  await ended(socket);
  await server.close();
});

const example = (file: string) => fileURLToPath(new URL(`./examples/${file}`, import.meta.url));

/** An example as this runtime runs it. */
function command(file: string, ...args: string[]): string[] {
  const options = "Deno" in globalThis ? ["run", "--quiet", "--no-check", "--allow-all"] : [];
  return [process.execPath, ...options, example(file), ...args];
}

/** The same as the dialplan calls it: not by its first line, so that the runtime is this one. */
function program(file: string, ...args: string[]): string {
  const [path, ...rest] = command(file, ...args);
  return `${path}(${rest.join(",")})`;
}

/** A program under way: what it has said, a wait for what it will say, and its exit status when it is over. */
function started([path, ...args]: string[], env: Record<string, string> = {}) {
  const group = path === "npx"; // which starts others
  const child = spawn(path!, args, { stdio: "pipe", detached: group, env: { ...process.env, ...env } });
  const said = { out: "", err: "" };
  child.stdout.on("data", (data) => said.out += data);
  child.stderr.on("data", (data) => said.err += data);
  let status: number | null | undefined;
  const closed = new Promise<number | null>((resolve) => child.once("close", (is) => resolve(status = is)));
  const kill = (signal: string) => {
    if (status === undefined) process.kill(group ? -child.pid! : child.pid!, signal); // Deno's child.kill() forgets its end
    return closed;
  };
  const says = async (what: RegExp, times = 1) => {
    const spoke = () => (said.out + said.err).split(what).length > times;
    await until(() => spoke() || status !== undefined);
    assert.ok(spoke(), `${what} was not said: ${said.out}${said.err}`);
  };
  const [stop, leave] = [() => kill("SIGTERM"), async () => void await kill("SIGKILL")];
  return { child, said, says, closed, kill, stop, [Symbol.asyncDispose]: leave };
}

/** A program that listens, with its port. */
async function serving(command: string[], env?: Record<string, string>) {
  const server = started(command, env);
  await server.says(/(?:Listening|Waiting|Started).*:\d+\/?\n/);
  return { ...server, port: Number(/:(\d+)\/?\n/.exec(server.said.out + server.said.err)![1]) };
}

/** Runs an example to its end. */
async function ran(file: string, ...args: string[]) {
  const { closed, said } = started(command(file, ...args));
  return { status: await closed, ...said };
}

/** Runs an example in wrong ways, which are answered with what is wrong in a certain form, and asks it for help. */
async function assertUsage(file: string, wrong: [args: string[], why: RegExp][], form: RegExp, help: RegExp) {
  const [asked, ...answers] = await Promise.all(
    [["--help"], ...wrong.map(([args]) => args)].map((args) => ran(file, ...args)),
  );
  for (const [i, { status, err, out }] of answers.entries()) {
    assert.deepEqual([status, out], [2, ""], wrong[i]![0].join(" "));
    assert.match(err, wrong[i]![1]);
    assert.match(err, form);
  }
  assert.equal(asked!.status, 0);
  assert.match(asked!.out, help);
}

/** Whether nobody listens any more. */
const refused = (port: number) =>
  new Promise<boolean>((resolve) => {
    const socket = dialed(port).on("error", () => resolve(true)).on("connect", () => {
      socket.destroy();
      resolve(false);
    });
  });

onUnix("menu: as a program it takes its call over its pipes, and ends with it", async () => {
  await using running = started(command("menu.ts", "support"));
  const [readable, stderr] = [running.child.stdout, running.child.stderr].map((output) => Readable.toWeb(output));
  const streams = { readable: readable!, writable: Writable.toWeb(running.child.stdin), stderr };
  const host = new Asterisk(streams, { application: "/path/menu.ts", args: ["support"], sounds: () => 0.01 });
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
  assert.equal(await running.closed, 0);
  assert.deepEqual(host.variables, { ACCOUNT: "1234", DEPARTMENT: "support" });
  assert.ok(!host.log.some((line) => line.startsWith("stderr")), host.log.join("\n"));
});

onUnix("menu: as a program whose stdout is gone it ends as it should, whenever its stdin does", async () => {
  await Promise.all([0, 1, 5, 20, 50].map(async (ms) => {
    await using running = started(command("menu.ts"));
    await new Promise((resolve) => running.child.stdout.once("data", resolve));
    running.child.stdout.destroy(); // the next wake-up finds it
    await pause(ms);
    running.child.stdin.end("E,1\n");
    assert.equal(await running.closed, 0, `${ms} ms: ${running.said.err}`);
  }));
});

onUnix("menu: as a server it takes calls until a signal comes, and those under way end first", async () => {
  await using server = await serving(command("menu.ts", "--listen", "127.0.0.1:0"));
  const hosts = await Promise.all([1, 2, 3].map(() => standIn(server.port, { sounds: () => 0.3 })));
  await until(() => hosts.every((host) => host.found.size));
  hosts[1]!.hangUp();
  assert.equal(await hosts[1]!.left, "hungup");
  const stopped = server.stop();
  await until(() => refused(server.port));
  for (const host of hosts) press(host, "1234#1");
  assert.deepEqual(await Promise.all(hosts.map(({ left }) => left)), ["continued", "hungup", "continued"]);
  assert.equal(await stopped, 0);
  assert.equal(server.said.out, "");
});

onUnix("menu: beyond --max-calls the dialplan goes on, and who is sent there takes nobody's place", async () => {
  await using server = await serving(command("menu.ts", "--listen", "127.0.0.1:0", "--max-calls", "1"));
  const called = async () => {
    const host = await standIn(server.port, { sounds: () => 0.01 });
    press(host, "1234#2");
    assert.equal(await host.left, "continued");
    return host.variables.EIVR;
  };
  const first = await standIn(server.port, { sounds: () => 1 });
  await until(() => first.found.size);
  assert.equal(await called(), "busy");
  const silent = dialed(server.port); // does not go on
  await new Promise((resolve) => silent.once("data", resolve));
  first.hangUp();
  await until(async () => await called() === undefined, 10);
  silent.destroy();
});

const onDeno = "Deno" in globalThis ? onUnix : test.skip;

/** Starts a server that may have few files open, and has it run out of them. */
async function crowded(program: string[]) {
  const server = await serving(["sh", "-c", 'ulimit -n 64 && exec "$0" "$@"', ...program]);
  const crowd = Array.from({ length: 100 }, () => dialed(server.port).on("error", () => {}).resume());
  await server.says(/Cannot accept a call: /);
  await Promise.all(crowd.map((socket) => new Promise((resolve) => socket.on("close", resolve).destroy())));
  return server;
}

onDeno("menu: as a server it takes calls again after file descriptors ran out", async () => {
  await using server = await crowded(command("menu.ts", "--listen", "127.0.0.1:0"));
  const host = await standIn(server.port, { sounds: () => 0.01 });
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
});

/** Options for the telephone. */
const sounds = (...lengths: string[]) => lengths.flatMap((length) => ["--sound", length]);

onUnix("phone: calls a program as scripted, and ends well where the dialplan goes on", async () => {
  const short = ["hello-world", "agent-user", "vm-press", "digits/1", "digits/2", "auth-thankyou"];
  const options = [...sounds(...short.map((name) => `${name}=0.05`)), "--set", "CITY=Žižkov"];
  const { status, out, err } = await ran("phone.ts", ...options, "--caller", "0.1 1234#2", program("menu.ts", "sales"));
  assert.equal(status, 0, err);
  assert.match(out, /the caller presses #/);
  assert.match(out, /--> V,ACCOUNT=1234\n/);
  assert.match(out, /log: Log message from EIVR: account known, department support\n/);
  assert.match(out, /the dialplan goes on\n$/);
});

onUnix("phone: its exit status is 1 where the call is hung up, or nobody answers", async () => {
  const [hungUp, broken, nobody] = await Promise.all([
    ran("phone.ts", "--caller", "1.5 hangup", program("menu.ts")),
    ran("phone.ts", "/nonexistent/program(1)"),
    ran("phone.ts", "ivr://127.0.0.1:1"),
  ]);
  assert.deepEqual([hungUp, broken, nobody].map(({ status }) => status), [1, 1, 1]);
  assert.match(hungUp.out, /hung up\n$/);
  assert.match(broken.err, /Failed to execute '\/nonexistent\/program'/);
  assert.match(nobody.err, /Could not connect/);
});

onUnix("phone: tells what became of each prompt, and ends without a word when nobody reads on", async () => {
  const options = [...sounds("hello-world=0.05"), "--caller", "1 1234#2"];
  await using phone = started(command("phone.ts", ...options, program("menu.ts")));
  await phone.says(/hello-world finished/);
  phone.child.stdout.destroy(); // and it goes on writing
  await phone.closed;
  assert.match(phone.said.out, /<-- Z,\d+,agent-user {2}\(agent-user missing\)\n/);
  assert.equal(phone.said.err, "");
});

/** What the telephone keeps of a call in a file of its own. */
async function kept(talk: (file: string) => Promise<unknown>): Promise<Recording> {
  const folder = mkdtempSync(join(tmpdir(), "phone-"));
  try {
    const file = join(folder, "call.json");
    await talk(file);
    return JSON.parse(readFileSync(file, "utf8"));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

onUnix("phone: keeps a call as a recording, which plays again without it", async () => {
  const recording = await kept(async (file) => {
    const options = sounds("hello-world=9", "vm-press=9", "digits/1=0.1", "digits/2=0.1", "auth-thankyou=0.1");
    options.push("--set", "CITY=Žižkov", "--transcript", file, "--caller", "1.3 1234#, 2.7 2");
    const { status, err } = await ran("phone.ts", ...options, program("menu.ts", "sales"));
    assert.equal(status, 0, err);
  });
  assert.ok(recording.received.length > 10);
  assert.deepEqual(recording.caller, [[1.3, "press", "1234#"], [2.7, "press", "2"]]);
  assert.ok(recording.log.includes("CONTINUED ACCOUNT=1234 DEPARTMENT=support"), recording.log.join("\n"));
  assertSame(await replay(recording), recording);
  const again = await replay(recording, menu);
  assert.deepEqual(untimedLines(again), untimedLines(recording));
  assert.deepEqual(again.log, recording.log);
});

onUnix("phone: Ctrl-C hangs up, and once more leaves an IVR that does not end; the call is kept", async () => {
  await using server = await listening(createServer((socket) => void socket.on("error", () => {}).resume()));
  const recording = await kept(async (file) => {
    const call = `ivr://127.0.0.1:${server.port},i`;
    await using phone = started(command("phone.ts", "--caller", "0.1 5", "--transcript", file, call));
    await phone.says(/<-- 5/);
    phone.kill("SIGINT");
    await phone.says(/<-- I/);
    assert.equal(await phone.kill("SIGINT"), 1, phone.said.err);
  });
  assert.deepEqual(untimedLines(recording), ["5", "I,HANGUP"]);
  assert.equal(recording.caller.at(-1)?.[1], "hangup");
  assert.equal(recording.ended, null);
  assert.deepEqual(untimedLines(await replay(recording)), untimedLines(recording));
});

/** Wrong use of the telephone. */
const PHONED: [args: string[], why: RegExp][] = [
  [[], /nobody to call/],
  [["ivr://x", "ivr://y"], /one too many/],
  [["--bogus", "ivr://x"], /bogus/],
  [["--sound", "beep", "ivr://x"], /NAME=VALUE/],
  [["--sound", "beep=long", "ivr://x"], /seconds/],
  [["--sounds", "/nonexistent", "ivr://x"], /nonexistent/],
  [["--caller", "1 x", "ivr://x"], /"1 x"/],
  [["--transcript", "/nonexistent/call.json", "ivr://x"], /call\.json/],
  [["ivr://x,q"], /n, i and d/],
  [["/bin/x(a"], /parenthesis/],
];

onUnix("phone: wrong use is answered with what is wrong, and help with help", async () => {
  await assertUsage("phone.ts", PHONED, /^phone\.ts: .*\nTry phone\.ts --help\n$/, /--caller[^]*--transcript FILE/);
});

// ---------------------------------------------------------------------------------------------------------
// 10. The edge and the relay
//
// A call crosses a WebSocket byte for byte. Where it cannot, the dialplan goes on, and so does every other call.
// ---------------------------------------------------------------------------------------------------------

/** The address of an edge. */
const ws = ({ port }: { port: number }, path = "/") => `ws://127.0.0.1:${port}${path}`;

/** The relay to these edges. */
function relay(edges: string[], options: string[] = [], env?: Record<string, string>) {
  return serving(command("relay.ts", "--listen", "127.0.0.1:0", ...options, ...edges), env);
}

/** The edge as Bun serves it, or Deno. */
function edge(env: Record<string, string> = {}) {
  if ("Bun" in globalThis) return serving(command("edge.ts"), { PORT: "0", ...env });
  const deno = "Deno" in globalThis ? [process.execPath] : ["npx", "-y", "-p", "deno@2.9.6", "deno"];
  const options = ["--no-check", "--allow-env=TOKEN", "--host", "127.0.0.1", "--port", "0"];
  return serving([...deno, "serve", ...options, example("edge.ts")], env);
}

/** An edge in this process that does with what comes, in bytes, what it likes. */
async function bareEdge(take: (socket: Socket, request: string) => void) {
  const sockets: Socket[] = [];
  const server = await listening(createServer((socket) => {
    sockets.push(socket);
    socket.on("error", () => {}).once("data", (request) => take(socket, String(request)));
  }));
  const close = () => {
    for (const socket of sockets) socket.destroy();
    return server.close();
  };
  return { port: server.port, close, [Symbol.asyncDispose]: close };
}

const [CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG, END] = [0, 1, 2, 8, 9, 10, 0x80];

/** The same, of frames: what it does first, and what at each frame of the relay's. */
function frameEdge(
  begin: (socket: Socket, request: string) => void,
  take: (socket: Socket, kind: number, payload: Buffer) => void = () => {},
) {
  return bareEdge((socket, request) => {
    const key = /^sec-websocket-key: (.*)\r$/mi.exec(request)![1];
    const hash = createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
    const head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    socket.write(`${head}Sec-WebSocket-Accept: ${hash}\r\n\r\n`);
    socket.on("data", reader((kind, payload) => take(socket, kind, payload)));
    begin(socket, request);
  });
}

/** A frame from the edge. The first byte is its kind, and whether it ends a message. */
function frame(first: number, payload: string | Uint8Array = ""): Buffer {
  const { length } = payload = Buffer.from(payload);
  const head = length < 126
    ? [length]
    : length < 65536
    ? [126, length >> 8, length & 255]
    : [127, 0, 0, 0, 0, length >> 24, length >> 16 & 255, length >> 8 & 255, length & 255];
  return Buffer.concat([Buffer.from([first, ...head]), payload]);
}

/** Ends a WebSocket with a code. */
const closing = (code: number) => frame(END | CLOSE, Buffer.of(code >> 8, code & 255));

/** Reads the frames of the relay, which are whole messages, short, and masked. */
function reader(take: (kind: number, payload: Buffer) => void): (data: Uint8Array) => void {
  let rest = Buffer.alloc(0);
  return (data) => {
    rest = Buffer.concat([rest, data]);
    for (let at; rest.length > 1; rest = rest.subarray(at)) {
      assert.ok(rest[0]! & END && rest[1]! > 127 && rest[1]! < 255, "it is not masked, or too long for this test");
      const head = rest[1]! < 254 ? 6 : 8;
      const length = rest[1]! < 254 ? rest[1]! & 127 : rest.readUInt16BE(2);
      if (rest.length < (at = head + length)) return;
      const mask = rest.subarray(head - 4, head);
      take(rest[0]! & 15, rest.subarray(head, at).map((byte, i) => byte ^ mask[i % 4]!) as Buffer);
    }
  };
}

onUnix("edge: calls come over the relay, to their end or the caller's, and nothing of them is logged", async () => {
  const env = { TOKEN: "secret" };
  await using far = await edge(env);
  await using near = await relay([ws(far)], [], env);
  const hosts = await Promise.all(Array.from({ length: 10 }, async (_, i) => {
    const host: Asterisk = await standIn(near.port, {
      sounds: () => 0.01,
      args: ["sales"],
      onNote: ({ kind }) => i % 2 && kind === "plays" && host.hangUp(),
    });
    if (i % 2 === 0) press(host, "1234#2");
    return host;
  }));
  const left = await Promise.all(hosts.map((host) => host.left));
  assert.deepEqual(left, hosts.map((_, i) => i % 2 ? "hungup" : "continued"));
  assert.deepEqual(hosts[0]!.variables, { ACCOUNT: "1234", DEPARTMENT: "support" });
  assert.equal(await near.stop(), 0);
  assert.equal(near.said.err.match(/ began, /g)!.length, 10);
  assert.equal(near.said.err.match(/ ended: Asterisk closed/g)!.length, 10);
  assert.doesNotMatch(near.said.err, /1234|secret/);
});

const UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"];
const KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==";
const ALLOWED = "Authorization: Bearer secret";

/** The heads of requests, and how an edge answers whose token is `secret`. */
const REQUESTS: [status: string, head: string[]][] = [
  ["426", [ALLOWED]],
  ["401", [...UPGRADE, KEY]],
  ["401", [...UPGRADE, KEY, "Authorization: Bearer secrex"]],
  ["401", [...UPGRADE, KEY, "Authorization: Bearer secret2"]],
  ["401", [...UPGRADE, KEY, "Authorization: Bearer "]],
  ["403", [...UPGRADE, KEY, ALLOWED, "Origin: https://example.com"]],
  ["400", [...UPGRADE, ALLOWED]],
  ["101", [...UPGRADE, KEY, ALLOWED]],
];

/** Sends a request, and gives the status of the answer and the connection. */
async function requested(port: number, head: string[]) {
  const socket = dialed(port);
  socket.write(`GET / HTTP/1.1\r\nHost: x\r\n${head.map((line) => `${line}\r\n`).join("")}\r\n`);
  const answer = await new Promise((resolve) => socket.once("data", resolve));
  return { status: String(answer).slice(9, 12), socket };
}

onUnix("edge: who has the token may call, but no browser may", async () => {
  await using far = await edge({ TOKEN: "secret" });
  const answers = await Promise.all(REQUESTS.map(async ([, head]) => {
    const { status, socket } = await requested(far.port, head);
    socket.destroy();
    return status;
  }));
  assert.deepEqual(answers, REQUESTS.map(([status]) => status));
});

/** Has something happen at an edge while another call goes on there, and gives what the edge said. */
async function besideACall(happens: (port: number) => Promise<void>): Promise<string> {
  await using far = await edge();
  await using near = await relay([ws(far)]);
  const host = await standIn(near.port, { sounds: () => 0.01 });
  await happens(far.port);
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
  await near.stop();
  await far.stop();
  const said = far.said.out + far.said.err;
  assert.doesNotMatch(said, /WebSocket|controller|stream/i);
  return said;
}

/** Which of the two ends first, upon what: by the last event, by a line without end; at once, in a line, behind the end. */
const FIRST: ["session" | "socket", words: string][] = [
  ["session", "H,1\n"],
  ["session", "x".repeat(2 ** 21)],
  ["socket", "P,1,iv"],
  ["socket", "H,1\n"],
  ["socket", "E,1\n1,1\n"],
  ["socket", ""],
];

onUnix("edge: a session or its WebSocket ends first, and no other call knows", async () => {
  const said = await besideACall(async (port) => {
    for (const [first, words] of FIRST) {
      const socket = new WebSocket(ws({ port }));
      const closed = new Promise((resolve) => socket.addEventListener("close", resolve));
      await new Promise((resolve) => socket.addEventListener("open", resolve));
      for (let at = 0; at < words.length; at += 2 ** 19) socket.send(words.slice(at, at + 2 ** 19));
      if (first === "socket") socket.close();
      await closed;
    }
  });
  assert.match(said, /overflow|more than/);
});

test("edge: a message of any size is chunks of 64 KiB at most, with which a session meets its bound in time", async () => {
  const socket = Object.assign(new EventTarget(), { readyState: 1, binaryType: "", send: () => {}, close: () => {} });
  const { readable } = webSocketStreams(socket as unknown as WebSocket);
  const text = "1,1\n".repeat(100_000);
  for (const data of [text, utf8(text).buffer]) socket.dispatchEvent(new MessageEvent("message", { data }));
  socket.dispatchEvent(new Event("close"));
  const reader = readable.getReader();
  let bytes = 0;
  for (let chunk; !(chunk = await reader.read()).done; bytes += chunk.value!.length) {
    assert.ok(chunk.value!.length <= 65_536, `${chunk.value!.length} bytes`);
  }
  assert.equal(bytes, 800_000);
});

onUnix("edge: a WebSocket is broken off without a word, and no other call knows", async () => {
  await besideACall(async (port) => {
    for (let i = 0; i < 5; i++) (await requested(port, [...UPGRADE, KEY])).socket.resetAndDestroy();
  });
});

onUnix("edge: after SIGTERM it takes no calls, and those under way end first", async () => {
  await using far = await edge();
  await using near = await relay([ws(far)]);
  const host = await standIn(near.port, { sounds: () => 0.05 });
  await until(() => host.found.size);
  const stopped = far.stop();
  for (;;) {
    const late = await standIn(near.port, { sounds: () => 1 });
    if (near.said.err.includes("503")) {
      assert.equal(await late.left, "continued");
      assert.deepEqual(late.variables, { EIVR: "unreachable" });
      break;
    }
    late.hangUp();
    await late.left;
  }
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
  assert.equal(host.variables.DEPARTMENT, "support");
  await stopped;
});

onUnix("edge: a call that begins as SIGTERM comes is refused, or lives", async () => {
  await Promise.all([0, 1, 2, 3, 4, 5].map(async (ms) => {
    await using far = await edge();
    const socket = new WebSocket(ws(far));
    let host: Asterisk | undefined;
    socket.addEventListener("open", () => {
      host = new Asterisk(webSocketStreams(socket), { sounds: () => 0.3 }); // longer than an edge without calls lives
      press(host, "1234#2");
    });
    const closed = new Promise((resolve) => {
      for (const how of ["close", "error"]) socket.addEventListener(how, resolve);
    });
    await pause(ms);
    const stopped = far.stop();
    await closed;
    if (host) assert.equal(await host.left, "continued");
    await stopped;
  }));
});

/** Messages as an edge may send them: their frames, some in two with a ping between, what they mean, and the pings. */
function randomMessages(random: Random): { wire: Buffer; meant: Buffer; pings: string[] } {
  const frames: Buffer[] = [], meant: Buffer[] = [], pings: string[] = [];
  for (let i = 0; i < 60; i++) {
    const length = random.of([0, 1, 125, 126, 127, 65535, 65536, 70_000]);
    const payload = Buffer.from(Array.from({ length }, () => random.below(128)));
    const kind = random.of([TEXT, BINARY]);
    meant.push(payload);
    if (random.below(2)) frames.push(frame(END | kind, payload));
    else {
      const at = random.below(payload.length + 1);
      frames.push(frame(kind, payload.subarray(0, at)));
      frames.push(frame(END | PING, pings[pings.push(`ping ${i}`) - 1]));
      frames.push(frame(END | CONTINUATION, payload.subarray(at)));
    }
  }
  return { wire: Buffer.concat(frames), meant: Buffer.concat(meant), pings };
}

onUnix("relay: messages of every kind, size and cut become the bytes of the call", async () => {
  const random = new Random(SEED);
  const { wire, meant, pings } = randomMessages(random);
  const pongs: string[] = [];
  let heard = "";
  await using far = await frameEdge(async (socket) => {
    for (let at = 0; at < wire.length;) {
      const size = 1 + random.below(random.of([3, 3000, 100_000]));
      await new Promise((resolve) => socket.write(wire.subarray(at, at += size), resolve));
    }
    await until(() => heard === "1,1\nH,1\n" && pongs.at(-1) === pings.at(-1));
    socket.end(closing(1000));
  }, (_, kind, payload) => {
    if (kind === PONG) pongs.push(payload.toString());
    if (kind === BINARY) heard += payload.toString();
  });
  await using near = await relay([ws(far)]);
  const call = dialed(near.port);
  call.write("1,1\nH,1\n"); // before there is an edge
  assert.equal(await ended(call), meant.toString("latin1"), `SEED=${SEED}`);
  assert.deepEqual(pongs, pings.filter((ping) => pongs.includes(ping))); // of several at once the last is answered
});

onUnix("relay: asks an edge with path and token and as no browser, and logs how the call ended", async () => {
  let asked = "";
  await using far = await frameEdge((socket, request) => {
    asked = request;
    socket.end(closing(1000));
  });
  await using near = await relay([ws(far, "/calls?from=here")], [], { TOKEN: "secret" });
  await ended(dialed(near.port));
  assert.match(asked, /^GET \/calls\?from=here HTTP\/1.1\r\n/);
  assert.match(asked, /^authorization: Bearer secret\r$/mi);
  assert.doesNotMatch(asked, /^origin:/mi);
  await near.says(/1 127\.0\.0\.1:\d+ ws:\/\/127\.0\.0\.1:\d+\/calls ended: the edge closed, 1000, \d+\.\d s\n/);
  assert.equal(await near.stop(), 0);
});

/** A certificate that nobody has reason to trust, and its key. */
const CERTIFICATE = {
  key: `-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQghljNlpaQgFFQvy5JonPZfPE4rGmvKK5QXA3eV4nv0XehRANCAAQ+9hoz0KPQXfo8
f6r9tTS6HBGVxh1G6KQYH8VG8hyBgjnAOjMTPCQ4E+yRnvLUi6ayXHU3B2vfsBiNoXdpyoKs
-----END PRIVATE KEY-----`,
  cert: `-----BEGIN CERTIFICATE-----
MIIBlTCCATugAwIBAgIUI9hfaxCmbqhg9/yTLsPxQzbn6BgwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjAyMjcy
OFoYDzIxMjYxMTAyMDIyNzI4WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ+9hoz0KPQXfo8f6r9tTS6
HBGVxh1G6KQYH8VG8hyBgjnAOjMTPCQ4E+yRnvLUi6ayXHU3B2vfsBiNoXdpyoKso2kwZzAdBgNVHQ4EFgQUuF86ytluNqOYtDI6LrVdmX+emtww
HwYDVR0jBBgwFoAUuF86ytluNqOYtDI6LrVdmX+emtwwDwYDVR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SAAwRQIgRmV1R4CkNmfq5pHxz+I5Ia48oBbx8gLX7sHe5r9bmycCIQC4ZssMpRqj+5z/eU4UZvlXmEKkjsFPKAAQywcBhwRr/g==
-----END CERTIFICATE-----`,
};

/** Edges that do not answer as they should, and what the relay says of them. */
const BROKEN: [why: RegExp, take: (socket: Socket) => void][] = [
  [/401/, (socket) => socket.end("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")],
  [/no WebSocket/, (socket) => socket.end("HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")],
  [/./, (socket) => socket.end("no HTTP\r\n\r\n")],
  [/./, (socket) => socket.destroy()],
  [/no answer in 3 s/, () => {}],
];

onUnix("relay: an edge that does not answer as it should is passed over", async () => {
  const edges = await Promise.all(BROKEN.map(([, take]) => bareEdge(take)));
  await using untrusted = await listening(createTlsServer(CERTIFICATE).on("tlsClientError", () => {}));
  await using last = await frameEdge(
    (socket) => socket.write(frame(END | TEXT, "E,bye\n")),
    (socket, kind) => kind === BINARY && socket.end(frame(END | CLOSE)),
  );
  const wss = `wss://localhost:${untrusted.port}/`;
  await using near = await relay(["ws://127.0.0.1:1/", wss, ...[...edges, last].map((edge) => ws(edge))]);
  const call = dialed(near.port);
  call.write("1,1\n");
  assert.equal(await ended(call), "E,bye\n");
  await near.stop();
  const [, ...said] = near.said.err.trim().split("\n");
  const reasons = [/REFUSED/, /certificate|signed/i, ...BROKEN.map(([why]) => why)];
  const failed = reasons.map(({ source, flags }) => RegExp(` failed: .*(?:${source}).*, \\d\\.\\d s$`, flags));
  assert.equal(said.length, failed.length + 2, near.said.err);
  for (const line of [...failed, / began, 3\.\d s$/, / ended: the edge closed, 3\.\d s$/]) {
    assert.match(said.shift()!, line);
  }
  for (const edge of edges) await edge.close();
});

onUnix("relay: where no edge answers, the dialplan goes on", async () => {
  await using near = await relay(["ws://127.0.0.1:1/", "ws://127.0.0.1:2/"]);
  const host = await standIn(near.port, { sounds: () => 1 });
  assert.equal(await host.left, "continued");
  assert.deepEqual(host.variables, { EIVR: "unreachable" });
  assert.equal(await near.stop(), 0);
});

onUnix("relay: where there are too many calls, the dialplan goes on", async () => {
  await using far = await frameEdge(() => {});
  await using near = await relay([ws(far)], ["--max-calls", "1"]);
  const first = dialed(near.port);
  await near.says(/began/);
  const second = await standIn(near.port, { sounds: () => 1 });
  assert.equal(await second.left, "continued");
  assert.deepEqual(second.variables, { EIVR: "busy" });
  first.end();
  await near.says(/1 \S+ \S+ ended: Asterisk closed/);
});

onUnix("relay: a caller who leaves while it connects costs nothing", async () => {
  const gone = Promise.withResolvers<void>();
  await using far = await bareEdge((socket) => {
    socket.on("close", () => gone.resolve());
    call.end("H,1\n");
  });
  await using near = await relay([ws(far), ws(far, "/second")]);
  const call = dialed(near.port);
  await gone.promise;
  await near.says(/ended: Asterisk closed, [01]\.\d s\n/);
  await near.stop();
  assert.doesNotMatch(near.said.err, /began|failed|second/);
});

const LINE = Buffer.alloc(65_536, "L,x\n");
const LETTERS = Buffer.alloc(65_538, frame(END | TEXT, "x")); // each a message

/** Writes on and on, as long as what is written is taken. */
function flood(socket: Socket, data: Uint8Array): void {
  const go = () => {
    while (!socket.destroyed && socket.write(data));
  };
  socket.on("drain", go);
  go();
}

/** Who floods whom, what edge and caller do for it, and what the relay says. */
const FLOODS: [who: string, edge: (socket: Socket) => void, caller: (socket: Socket) => void, says: RegExp][] = [
  ["an edge", (socket) => flood(socket, frame(END | BINARY, LINE)), () => {}, /Asterisk does not read/g],
  [
    "an edge with a message of a gigabyte",
    (socket) => {
      socket.write(Buffer.from([END | BINARY, 127, 0, 0, 0, 0, 64, 0, 0, 0]));
      flood(socket, LINE);
    },
    () => {},
    /Asterisk does not read/g,
  ],
  ["an edge with messages of a byte", (socket) => flood(socket, LETTERS), () => {}, /Asterisk does not read/g],
  ["Asterisk", (socket) => socket.pause(), (socket) => flood(socket, LINE), /the edge does not read/g],
];

for (const [who, edge, caller, says] of FLOODS) {
  onUnix(`relay: a flood by ${who} ends the call, and the memory stays small`, async () => {
    await using far = await frameEdge(edge);
    await using near = await relay([ws(far)]);
    await Promise.all(Array.from({ length: 20 }, async () => {
      const call = dialed(near.port).on("error", () => {}).pause();
      caller(call);
      const closed = new Promise((resolve) => call.on("close", resolve));
      await near.says(/does not read/, 20);
      call.resume();
      await closed;
    }));
    assert.equal(near.said.err.match(says)!.length, 20);
    if (process.platform === "linux") {
      const [, peak] = /^VmHWM:\s*(\d+) kB$/m.exec(readFileSync(`/proc/${near.child.pid}/status`, "utf8"))!;
      assert.ok(Number(peak) < 300 * 1024, `${peak} kB`);
    }
  });
}

onUnix("relay: an edge that dies without a word is noticed", async () => {
  await using far = await edge();
  await using near = await relay([ws(far)], ["--ping", "0.3"]);
  const over = ended(dialed(near.port));
  await near.says(/began/);
  far.kill("SIGSTOP");
  await near.says(/ended: the edge is silent/);
  await over;
});

onUnix("relay: an edge that is only quiet keeps its calls", async () => {
  let pings = 0;
  await using far = await frameEdge(() => {}, (socket, kind, payload) => {
    if (kind !== PING) return;
    socket.write(frame(END | PONG, payload));
    if (++pings === 5) socket.end(closing(1001));
  });
  await using near = await relay([ws(far)], ["--ping", "0.3"]);
  await ended(dialed(near.port));
  await near.says(/ended: the edge closed, 1001/);
});

onUnix("relay: an edge that is killed ends its calls, and the next go on to another", async () => {
  await using killed = await edge();
  await using far = await edge();
  await using near = await relay([ws(killed), ws(far)]);
  const lost = ended(dialed(near.port));
  await near.says(/began/);
  await killed.kill("SIGKILL");
  await lost;
  await near.says(/1 \S+ \S+ ended: the edge is gone/);
  const host = await standIn(near.port, { sounds: () => 0.05 });
  await near.says(/2 \S+ \S+ began/);
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
});

onUnix("relay: after SIGTERM it takes no calls, and those under way end first", async () => {
  await using far = await edge();
  await using near = await relay([ws(far)]);
  const host = await standIn(near.port, { sounds: () => 0.05 });
  await near.says(/began/);
  const stopped = near.stop();
  await until(() => refused(near.port));
  press(host, "1234#2");
  assert.equal(await host.left, "continued");
  assert.equal(await stopped, 0);
});

onDeno("relay: takes calls again after file descriptors ran out", async () => {
  await using far = await frameEdge(() => {}, (socket, kind) => {
    if (kind === BINARY) socket.end(frame(END | TEXT, "E,bye\n"));
  });
  await using near = await crowded(command("relay.ts", "--listen", "127.0.0.1:0", ws(far)));
  await until(async () => {
    const call = dialed(near.port);
    call.write("1,1\n");
    const said = await ended(call);
    assert.match(said, /^E,bye\n$|^V,EIVR=unreachable\nE,/); // callers who left have theirs a little longer
    return said.startsWith("E");
  });
});

onUnix("relay: a log that nobody reads any more ends no call", async () => {
  await using near = await relay(["ws://127.0.0.1:1/"]);
  near.child.stderr.destroy();
  for (let i = 0; i < 3; i++) assert.match(await ended(dialed(near.port)), /^V,EIVR=unreachable\nE,/);
  assert.equal(await near.stop(), 0);
});

/** Wrong use of the relay. */
const RELAYED: [args: string[], why: RegExp][] = [
  [[], /no edge/],
  [["ws://[::1/"], /"ws:\/\/\[::1\/"/],
  [["http://localhost/"], /wss:\/\//],
  [["ws://x/", "--listen", "x:y"], /"x:y"/],
  [["ws://x/", "--listen", "70000"], /"70000"/],
  [["ws://x/", "--max-calls", "0"], /above zero/],
  [["ws://x/", "--max-calls", "-1"], /ambiguous/],
  [["ws://x/", "--ping", "x"], /above zero/],
  [["ws://x/", "--bogus"], /bogus/],
];

onUnix("relay: wrong use is answered in a line, and help with help", async () => {
  await using taken = await listening(createServer());
  const used: typeof RELAYED[0] = [["ws://x/", "--listen", `${taken.port}`], /in use/i];
  await assertUsage("relay.ts", [...RELAYED, used], /^relay\.ts: .*\n$/, /--max-calls/);
});

// ---------------------------------------------------------------------------------------------------------
// 11. Live: with an Asterisk 22, where there is one (`deno task live`)
//
// It does what the recordings and the stand-in do, and the promises above hold there. No channel and no process stays.
// ---------------------------------------------------------------------------------------------------------

/** A test with the live Asterisk, whose channels are gone at its end. */
function live(name: string, body: (asterisk: Live) => Promise<unknown>, timeout = 120_000): void {
  test(`live: ${name}`, { skip: !place, timeout }, async () => {
    const asterisk = await Live.connect();
    try {
      await body(asterisk);
      await until(async () => await asterisk.channels() === 0, 5);
    } finally {
      await asterisk.close();
    }
  });
}

live("the recordings are what Asterisk does, and the stand-in", async (asterisk) => {
  await Promise.all(
    recordings().map(async (recorded) => {
      assertSame(await replay(recorded), recorded);
      for (let tries = 1;; tries++) {
        const now = untimed(await record(asterisk, recorded));
        // On a machine that is busy a frame of audio may come too late for what was meant to follow it
        if (tries === 3 || isDeepStrictEqual(now, untimed(recorded))) {
          return assert.deepEqual(now, untimed(recorded), recorded.name);
        }
        console.error(`again: ${recorded.name}`);
      }
    }),
  );
});

/** Bytes that mean something somewhere, or nothing anywhere, but none that ends a line; and those a variable may hold. */
const BYTES = [...'ab,=; DHX0#*(")\\$%{}[]é\xff\t'];
const VALUES = BYTES.filter((byte) => byte !== ",");

/** A command for the playlist. */
function randomPrompt(random: Random): string {
  const file = random.of(["beep", "short", "medium", "long", "empty", "bad", "nosuch", random.text(BYTES, 5)]);
  return random.of([`S,${file}`, `A,${file}`, `A,${file}`, "A,long", "A,short\nA,empty", "I,x", "O,autoclear"]);
}

/** Any other command as applications send it, or as none should. */
function randomCommand(random: Random): string {
  const name = () => random.of(["A", "B", "_A", "__B", "GIVEN"]);
  const other = () => random.of([name(), "SHARED", "EXTEN", "CALLERID(num)", "NONE", "", random.text(BYTES, 3)]);
  const time = () => random.of(["", "50", "200", "0.1s", "100ms", "abc", "1 s", "1e2", "99x"]);
  const keys = () =>
    random.of(["1", "12", "w", "1W2", "aDf", "F#", "1 x", "(2", ")(3", '"1,2"', random.text(BYTES, 3)]);
  return random.of([
    () => "T,x",
    () => `O,${random.of(["autoclear", "NoAutoclear", "autoclear", "bogus"])}`,
    () => `D,${keys()}${random.of(["", `,${time()}`, `,${time()},${time()}`, `,${time()},${time()},9`])}`,
    () => `V,${name()}=${random.text(VALUES, 9)}`,
    () => `V,A=${random.text(VALUES, 3)},B`,
    () => `V,A=${random.of(["x", "y"]).repeat(random.of([1017, 1018, 1019, 1500, 2100]))}`,
    () => `G,${other()},${other()},${name()}`,
    () => "G,A,B,A,A,GIVEN",
    () => "P,x",
    () => `L,${random.text(BYTES, 20)}`,
    () => random.text(BYTES, 4),
    () => random.of(["P", "E,", "s,beep", "  P,x", "S;beep", "A,be\0ep", "A,beep \t\r", "Q,x", "\0", " \t "]),
    () => random.below(4) ? "" : random.of(["H,done", "E,done", "X,done"]),
  ])();
}

/** What an application may write, in pieces, and how it ends. */
function randomSteps(random: Random, program: boolean): Recording["steps"] {
  const steps: Recording["steps"] = [];
  let at = 0.3;
  const step = (text: string | null, to?: "stderr") => {
    steps.push(to ? [at, text, to] : [at, text]);
    at += 0.15 + random.below(6) / 10;
  };
  for (let i = 0; i < 3 + random.below(6); i++) {
    const to = program && random.below(4) === 0 ? "stderr" : undefined;
    const lines = random.of([1, 1, 1, 2, 3, 20]);
    const line = () => {
      if (to) return random.text(BYTES, random.of([3, 30, 1100]));
      return random.below(lines) < 2 && random.below(3) ? randomPrompt(random) : randomCommand(random);
    };
    const text = Array.from({ length: lines }, () => `${line()}\n`).join("");
    const cut = random.below(6) ? 0 : random.below(text.length);
    if (cut) step(text.slice(0, cut), to);
    step(text.slice(cut), to);
    if (random.below(2)) step("\n");
  }
  const end = random.of(["E", "E", "H", "X", "end", ...program ? ["stderr"] as const : []]);
  if (end === "stderr") step(null, end);
  else if (end === "end") step(null);
  else step(`\n${end},done\n`);
  step("\n");
  return steps;
}

/** A call that anything may happen in. */
function randomCall(random: Random): RecordingFile {
  const program = random.below(3) === 0;
  const options = random.of(["", "", "", "", "", "", "i", "i", "i", "n", "n", "ni", "d", "nd"]);
  const caller: CallerAction[] = [];
  for (let at = 0.2; !options.includes("d") && caller.length < 4 && random.below(4); at += random.below(2000) / 1000) {
    const keys = random.text("0123456789*#ABCD", 3);
    if (random.below(4)) caller.push([at, "press", keys]);
    else if (caller.push([at, "hangup"])) break;
    at += keys.length / 4; // who hangs up presses no more
  }
  return {
    name: "random",
    title: "",
    asterisk: "22",
    ...scenario({
      application: program ? "/path/program" : "ivr://127.0.0.1:2949",
      args: random.of([[], ["sales"], ["a b", "", "c"]]),
      options,
      sounds: { empty: 0, beep: 0.2, short: 0.5, medium: 2, long: 5 },
      unreadable: ["bad"],
      variables: { GIVEN: random.text(BYTES, 9) },
      globals: { SHARED: "from globals" },
      caller,
      steps: randomSteps(random, program),
      ended: null,
    }),
  };
}

/** What a call came to, but when. */
type Came = { received: string[]; ended: string | null; log: unknown[] };

function outcome(recording: Recording): Came {
  const { received, ended, log } = untimed(recording as RecordingFile) as Omit<Came, "log"> & { log: string[] };
  // Of the variables a live Asterisk tells those that are not empty
  const set = (text: string) => text.split(/ (?=(?:A|B|GIVEN)=)/).filter((part) => !/^\w*=?$/.test(part)).sort();
  const told = (line: string) => line.startsWith("CONTINUED ") ? ["CONTINUED", ...set(line.slice(10))] : line;
  return { received, ended, log: log.map(told) };
}

/** Whether what came of a call hangs on moments, so that no two calls need be the same. */
function hangsOnMoments(notes: Note[]): boolean {
  const of = (kind: Note["kind"]) => notes.filter((note) => note.kind === kind);
  const soon = (others: Note[], { at }: Note, time: number) =>
    others.filter((other) => other.at >= at && other.at < at + time);
  // Whether a frame looks at what was queued before the next command does something to it
  const frame = of("command").some((queued, i, commands) => {
    const next = soon(commands.slice(i + 1), queued, 0.06).map(({ text }) => text[0]!);
    return /^[SA]../.test(queued.text) &&
      next.some((letter) => "SIHEX".includes(letter) || /A.*empty$/.test(queued.text));
  });
  // How Asterisk takes several keys that have waited, and keys while others are sent
  const heard = ({ text }: Note, events: Note[]) => events.some((event) => event.text[0] === text.at(-1));
  const late = of("caller").filter((key) => !heard(key, soon(of("event"), key, 1e-6)));
  const waited = late.filter((key) => heard(key, soon(of("event"), key, Infinity)));
  return frame || waited.length > 1 || late.some((key) => soon(of("sends"), key, 3).length);
}

/** The same call with all that comes together by chance, the caller, the commands, the ends of prompts, at other times. */
function shifted(call: RecordingFile, random: Random): RecordingFile {
  const shift = (at: number) => Math.max(0, at + random.of([-0.08, 0.08]));
  const longer = ([file, length]: [string, number]) => [file, length && length + random.of([0, 0.06])];
  return {
    ...call,
    caller: call.caller.map(([at, ...does]) => [shift(at), ...does] as CallerAction),
    steps: call.steps.map(([at, ...does]) => [shift(at), ...does] as const),
    sounds: Object.fromEntries(Object.entries(call.sounds).map(longer)),
  };
}

/** What a call comes to with the stand-in, if it comes to the same at other moments. */
async function foreseen(call: RecordingFile, random: Random): Promise<Came | undefined> {
  const notes: Note[] = [];
  const came = outcome(await replay(call, undefined, (note) => notes.push(note)));
  if (hangsOnMoments(notes)) return undefined;
  for (let tries = 0; tries < 20; tries++) {
    if (!isDeepStrictEqual(outcome(await replay(shifted(call, random))), came)) return undefined;
  }
  return came;
}

/** Places a call in the live Asterisk, and gives how it differs from what was foreseen. */
async function differs(asterisk: Live, call: RecordingFile, came: Came): Promise<string> {
  const { ended, ...now } = outcome(await record(asterisk, call));
  // Asterisk that closes with something unread resets the connection, whereupon its last words may be lost
  const received = ended === "reset" ? came.received.slice(0, now.received.length) : came.received;
  try {
    assert.deepEqual({ ...now, ended: !!ended }, { received, log: came.log, ended: !!came.ended });
    return "";
  } catch (error) {
    const { application, args, options, variables, caller, steps } = call;
    const told = inspect({ application, args, options, variables, caller, steps }, { depth: 9, breakLength: 120 });
    return `${told}\n${(error as Error).message}\n`;
  }
}

live("random calls come to the same with the stand-in", async (asterisk) => {
  await asterisk.setGlobal("SHARED", "from globals");
  let calls: { seed: number; call: RecordingFile; came: Came; difference?: string }[] = [];
  const count = "Deno" in globalThis ? 500 : 50; // the two that are compared are the same on every runtime
  for (let seed = SEED; calls.length < count; seed++) {
    const call = randomCall(new Random(seed));
    const came = await foreseen(call, new Random(seed));
    if (came) calls.push({ seed, call, came });
  }
  // Many at once may bring together what was apart: a difference has to show with few at a time as well
  for (const lines of [40, 10, 2]) {
    if (lines < 40 && calls.length > 10 * lines) break; // that many are no accident
    const waiting = [...calls];
    await Promise.all(Array.from({ length: lines }, async () => {
      for (let next; (next = waiting.pop());) next.difference = await differs(asterisk, next.call, next.came);
    }));
    calls = calls.filter(({ difference }) => difference);
  }
  assert.equal(calls.length, 0, calls.map(({ seed, difference }) => `SEED=${seed}: ${difference}`).join("\n"));
}, 600_000);

/** The same text as Asterisk's bytes, each a character. */
const bytes = (text: string): string => Buffer.from(text).toString("latin1");

/** A call of the live Asterisk that a handler answers over TCP, and what Asterisk tells of it. */
async function called(
  asterisk: Live,
  handler: (ivr: Ivr, call: LiveCall) => Promise<unknown>,
  { args = [], options = "", caller = [], ...rest }: LiveOptions & Partial<Dialplan> & { caller?: CallerAction[] } = {},
): Promise<Over> {
  const placed = Promise.withResolvers<LiveCall>();
  const server = await served(async (ivr) => handler(ivr, await placed.promise));
  const text = `ivr://127.0.0.1:${server.port}${args.length ? `(${args})` : ""}${options && `,${options}`}`;
  placed.resolve(asterisk.call(`ExternalIVR(${text})`, rest));
  const call = await placed.promise;
  await call.plan(caller);
  const over = await call.over;
  await server.close();
  return over;
}

live("params and get bring what the dialplan gave, set and log what the application gives", async (asterisk) => {
  await asterisk.setGlobal("EVERYBODYS", "global");
  const given = { CITY: "Brno, 1=1" };
  const { variables, log } = await called(asterisk, async (ivr) => {
    assert.deepEqual((await ivr.params()).slice(1), ["sales", "a b"]);
    assert.deepEqual(await ivr.get("CITY", "NONE", "EVERYBODYS"), { ...given, NONE: "", EVERYBODYS: "global" });
    await ivr.set({ ACCOUNT: "1234", "CALLERID(name)": "Žofie" });
    await ivr.log("one\ntwo");
    await ivr.exit("done");
  }, { args: ["sales", "a b"], variables: given, names: ["ACCOUNT", "CALLERID(name)", "CITY"] });
  assert.deepEqual(variables, { ...given, ACCOUNT: "1234", "CALLERID(name)": bytes("Žofie") });
  const messages = ["one", "two"].map((message) => `Log message from EIVR: ${message}`);
  assert.deepEqual(log, [...messages, "Exiting: done", "CONTINUED", "HUNGUP"]);
});

live("play, queue, interrupt, autoclear and sendDtmf do what their promises tell", async (asterisk) => {
  const { log } = await called(asterisk, async (ivr, call) => {
    await ivr.answer();
    assert.equal(await ivr.play("short"), "finished");
    assert.equal(await ivr.play("nosuch"), "missing");
    const prompts = ["long", "short", "medium"].map((file) => ivr.queue(file));
    await ivr.sendDtmf("12", { interval: 100, duration: 100 }); // meanwhile the first begins
    await ivr.interrupt();
    assert.deepEqual(await Promise.all(prompts), ["interrupted", "dropped", "dropped"]);
    assert.deepEqual(await Promise.all([ivr.queue("bad"), ivr.queue("beep")]), ["skipped", "finished"]);
    await ivr.autoclear(true);
    const cleared = [ivr.queue("long"), ivr.queue("beep")];
    await call.press("D");
    assert.deepEqual(await Promise.all(cleared), ["interrupted", "dropped"]);
    await ivr.autoclear(false);
    assert.deepEqual(await ivr.gather({ timeout: 0 }), { digits: "D", reason: "timeout", outcomes: [] });
    await ivr.exit("done");
  });
  const told = ["Unknown file requested 'nosuch'", "Sending DTMF: 12 100 100", "File 'bad' could not be opened"];
  assert.deepEqual(log, [...told, "Exiting: done", "CONTINUED", "HUNGUP"]);
});

live("hangup ends the call", async (asterisk) => {
  const { log } = await called(asterisk, (ivr) => ivr.hangup("enough"));
  assert.deepEqual(log, ["Hanging up: enough", "HUNGUP"]);
});

live("a caller who hangs up ends everything", async (asterisk) => {
  const { log, variables } = await called(asterisk, async (ivr) => {
    assert.equal(await ivr.play("long"), "ended");
    assert.ok(ivr.signal.aborted);
    assert.equal((await ivr.closed).by, "caller");
    await ivr.set({ X: "1" });
  }, { caller: [[0.3, "hangup"]], names: ["X"] });
  assert.deepEqual([log, variables], [["HUNGUP"], { X: "" }]);
});

live("with the option n nothing plays until the call is answered", (asterisk) =>
  called(asterisk, async (ivr) => {
    assert.equal(await ivr.play("short"), "refused");
    await assert.rejects(ivr.interrupt(), code("refused"));
    await assert.rejects(ivr.autoclear(true), code("refused"));
    await ivr.answer();
    assert.equal(await ivr.play("short"), "finished");
    await ivr.exit();
  }, { options: "n" }));

live("with the option i variables still work after the caller's hangup", (asterisk) =>
  called(asterisk, async (ivr) => {
    assert.equal(await ivr.play("long"), "ended");
    assert.equal(await ivr.play("short"), "refused");
    assert.deepEqual(await ivr.get("CITY"), { CITY: "Brno" });
    await ivr.hangup();
  }, { options: "i", caller: [[0.3, "hangup"]], variables: { CITY: "Brno" } }));

live("with the option d nothing plays, and the dialplan goes on", async (asterisk) => {
  const { variables, left } = await called(asterisk, async (ivr) => {
    assert.equal(await ivr.play("short"), "refused");
    await ivr.set({ X: "1" });
    await ivr.exit();
  }, { options: "d", dead: true, names: ["X"] });
  assert.deepEqual([variables, left], [{ X: "1" }, "continued"]);
});

live("any texts are the same on both sides", async (asterisk) => {
  await Promise.all(Array.from({ length: 50 }, async (_, i) => {
    const random = new Random(SEED + i);
    const text = (most: number) => `${random.text([..."ab=(\")\\$;{}[]%é€' "], most)}.`;
    const [given, message, set] = [text(50), text(50), { X: text(300), Y: text(10) }];
    const { log, variables } = await called(asterisk, async (ivr) => {
      assert.deepEqual(await ivr.get("GIVEN"), { GIVEN: `${given},${given}` });
      await Promise.all([ivr.set(set), ivr.log(message)]);
      await ivr.exit(message);
    }, { variables: { GIVEN: bytes(`${given},${given}`) }, names: ["X", "Y"] });
    assert.deepEqual(variables, { X: bytes(set.X), Y: bytes(set.Y) }, `SEED=${SEED + i}`);
    assert.deepEqual(log.slice(0, 2), [`Log message from EIVR: ${bytes(message)}`, `Exiting: ${bytes(message)}`]);
  }));
});

live("bursts are carried out at once and in order", async (asterisk) => {
  for (const size of [20, 200]) {
    const messages = Array.from({ length: size }, (_, i) => `number ${i}`);
    const { log } = await called(asterisk, async (ivr) => {
      const began = performance.now();
      await Promise.all(messages.map((message) => ivr.log(message)));
      assert.ok(performance.now() - began < 2000, "stalled");
      await ivr.exit("done");
    });
    const logged = messages.map((message) => `Log message from EIVR: ${message}`);
    assert.deepEqual(log, [...logged, "Exiting: done", "CONTINUED", "HUNGUP"]);
  }
});

live("a refusal in a burst is told to its own command", async (asterisk) => {
  await Promise.all(["", "n"].map(async (options, i) => {
    const random = new Random(SEED + i);
    const up = options === "";
    await called(asterisk, async (ivr) => {
      const asked = Array.from({ length: 40 }, () =>
        random.of<() => [Promise<unknown>, unknown]>([
          () => [ivr.set({ A: "1" }), undefined],
          () => [ivr.log("x"), undefined],
          () => [ivr.get("NONE"), { NONE: "" }],
          () => [ivr.queue("nosuch"), up ? "missing" : "refused"],
          () => [ivr.send({ type: "play", file: "nosuch" }).catch(({ code }) => code), "refused"],
          () => [ivr.interrupt().catch(({ code }) => code), up ? undefined : "refused"],
        ])());
      assert.deepEqual(await Promise.all(asked.map(([result]) => result)), asked.map(([, expected]) => expected));
      await ivr.exit();
    }, { options });
  }));
});

live("keys typed ahead wait, and the first key interrupts the prompts", async (asterisk) => {
  await called(asterisk, async (ivr, call) => {
    await Promise.all([call.press("12#3"), ivr.play("medium")]);
    assert.deepEqual(await ivr.gather(), { digits: "12", reason: "terminator", terminator: "#", outcomes: [] });
    assert.deepEqual(await ivr.gather({ prompt: "long", maxDigits: 1 }), {
      digits: "3",
      reason: "maxDigits",
      outcomes: [],
    });
    const began = performance.now();
    const [gathered] = await Promise.all([ivr.gather({ prompt: ["medium", "long"], maxDigits: 2 }), call.press("45")]);
    assert.deepEqual(gathered, { digits: "45", reason: "maxDigits", outcomes: ["interrupted", "dropped"] });
    assert.ok(performance.now() - began < 1500);
    await ivr.exit();
  });
});

live("a hundred calls at once, whose callers hang up at random: nothing that was set is lost", async (asterisk) => {
  await Promise.all(Array.from({ length: 100 }, async (_, i) => {
    const random = new Random(SEED + i);
    let done = 0;
    const { variables } = await called(asterisk, async (ivr) => {
      ivr.queue("short");
      for (let next = 1;; next++) {
        await Promise.all([
          ivr.set({ COUNT: String(next) }),
          random.below(2) ? ivr.log("…") : ivr.gather({ timeout: 9 }),
        ]);
        done = next;
      }
    }, { caller: [[0.1, "press", "1*"], [random.below(2000) / 1000, "hangup"]], names: ["COUNT"] });
    // What was under way may have been carried out or not
    assert.ok([done, done + 1].includes(Number(variables.COUNT)), `${done}: ${variables.COUNT}, SEED=${SEED + i}`);
  }));
});

/** A caller of the menu who has an account and chooses the support. */
const PRESSES: CallerAction[] = [[1.9, "press", "1234#"], [6, "press", "2"]];

live("menu: as a server, to callers who hang up at any step, or not at all", async (asterisk) => {
  await Promise.all(Array.from({ length: 25 }, async (_, i) => {
    const hangsUp: CallerAction[] = i < 24 ? [[i / 2, "hangup"]] : [];
    const names = ["ACCOUNT", "DEPARTMENT"];
    const { left, variables } = await called(asterisk, menu, {
      args: ["sales"],
      names,
      caller: [...PRESSES, ...hangsUp],
    });
    if (i > 10) assert.equal(variables.ACCOUNT, "1234");
    if (i > 16) assert.equal(variables.DEPARTMENT, "support");
    if (i === 24) assert.equal(left, "continued");
  }));
});

/** The processes whose command has this argument. */
function processes(argument: string): string[] {
  return readdirSync("/proc").filter((name) => /^\d+$/.test(name)).filter((pid) => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").includes(argument);
    } catch {
      return false; // it is gone
    }
  });
}

live("menu: as a program, to callers who stay and callers who hang up: no process stays", async (asterisk) => {
  const ours = `sales-${process.pid}`;
  await Promise.all([undefined, 0, 0.5, 3].map(async (at) => {
    const call = await asterisk.call(`ExternalIVR(${program("menu.ts", ours)})`, { names: ["ACCOUNT", "DEPARTMENT"] });
    await call.plan([[3, "press", "1234#2"], ...at === undefined ? [] : [[at, "hangup"] as const]]);
    const { left, log, variables } = await call.over;
    assert.deepEqual(log.filter((line) => line.startsWith("stderr")), []);
    if (at !== undefined) return assert.equal(left, "hungup");
    assert.deepEqual([left, variables], ["continued", { ACCOUNT: "1234", DEPARTMENT: "support" }]);
  }));
  await until(() => processes(ours).length === 0);
});

live("a program that is killed is a call that is hung up, and what it has set stays", async (asterisk) => {
  const ours = `killed-${process.pid}`;
  const call = await asterisk.call(`ExternalIVR(${program("menu.ts", ours)})`, { names: ["ACCOUNT"] });
  await call.press("1234#");
  await until(async () => await call.get("ACCOUNT") === "1234");
  for (const pid of processes(ours)) process.kill(Number(pid), "SIGKILL");
  const { log, variables } = await call.over;
  assert.deepEqual([log, variables], [["Child process went away", "HUNGUP"], { ACCOUNT: "1234" }]);
});

live("a server that goes away is a call that is hung up, and one that is not there fails", async (asterisk) => {
  const { port, close } = await listening(createServer((socket) => void socket.destroy()));
  const left = await asterisk.call(`ExternalIVR(ivr://127.0.0.1:${port})`);
  assert.deepEqual((await left.over).log, ["Child process went away", "HUNGUP"]);
  await close();
  const nobody = await asterisk.call(`TryExec(ExternalIVR(ivr://127.0.0.1:${port}))`, { names: ["TRYSTATUS"] });
  const over = await nobody.over;
  assert.deepEqual([over.left, over.variables], ["continued", { TRYSTATUS: "FAILED" }]);
});

/** A call of the menu behind a relay: where it went, and what the dialplan finds. */
async function relayed(asterisk: Live, { port }: { port: number }, caller: CallerAction[]): Promise<string[]> {
  const names = ["ACCOUNT", "DEPARTMENT", "EIVR"];
  const call = await asterisk.call(`ExternalIVR(ivr://127.0.0.1:${port}(sales))`, { names });
  await call.plan(caller);
  const { left, variables } = await call.over;
  return [left, ...names.map((name) => variables[name]!)];
}

live("edge: over the relay, to callers who hang up at any step, or not at all", async (asterisk) => {
  const env = { TOKEN: "secret" };
  await using far = await edge(env);
  await using near = await relay(["ws://127.0.0.1:1/", ws(far)], [], env);
  await Promise.all(Array.from({ length: 25 }, async (_, i) => {
    const hangsUp: CallerAction[] = i < 24 ? [[i / 2, "hangup"]] : [];
    const went = await relayed(asterisk, near, [...PRESSES, ...hangsUp]);
    if (i > 10) assert.equal(went[1], "1234");
    if (i > 16) assert.equal(went[2], "support");
    if (i === 24) assert.equal(went[0], "continued");
    assert.equal(went[3], "");
  }));
});

live("relay: where no edge answers the dialplan goes on, and knows why", async (asterisk) => {
  await using alone = await relay(["ws://127.0.0.1:1/"]);
  assert.deepEqual(await relayed(asterisk, alone, []), ["continued", "", "", "unreachable"]);
});

/** The files that Asterisk plays for an application of the dialplan: in the language where they are over at once. */
async function played(asterisk: Live, application: string): Promise<string[]> {
  const call = await asterisk.call(bytes(application), { variables: { "CHANNEL(language)": "en_quick" } });
  const { lines } = await call.over;
  return lines.flatMap((line) => /^VERBOSE file\.c: .* Playing '(.*)\.\w+' /.exec(line)?.[1] ?? []);
}

/** The characters of ASCII and two others, but for those that behind a $ would be the dialplan's. */
const CHARACTERS = [..."\té", ...Array.from({ length: 95 }, (_, i) => String.fromCharCode(32 + i))]
  .filter((character) => !"{[".includes(character));
const ZONES = ["UTC", "Europe/Prague", "America/New_York", "America/St_Johns", "Asia/Kolkata", "Australia/Lord_Howe"];

/** An application of each kind, to say something random. */
function randomApplications(random: Random): string[] {
  const value = sayable(random);
  const text = `a${random.text(CHARACTERS, 8)}z`;
  const time = `${(random.below(200 * 365 * 1440) - 68 * 365 * 1440) * 60},${random.of(ZONES)}`;
  return [
    `SayNumber(${value})`,
    `SayOrdinal(${value || 1})`,
    `SayDigits(${random.text("0123456789*#-", 12)})`,
    ...["Alpha", "Phonetic", "Digits"].map((name) => `Say${name}(${text})`),
    ...["", ",IMp", ",ABdY"].map((format) => `SayUnixTime(${time}${format})`),
  ];
}

live("say: what it gives is what Asterisk plays", (asterisk) =>
  forAll(1, async (random) => {
    const applications = SAID.map(([application]) => application);
    for (let i = 0; i < 40; i++) applications.push(...randomApplications(random));
    while (applications.length) {
      await Promise.all(
        applications.splice(0, 50).map(async (application) => {
          assert.deepEqual(await played(asterisk, application), said(application), application);
        }),
      );
    }
  }));
