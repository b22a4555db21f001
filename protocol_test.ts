// Copyright 2026 the ExternalIVR authors. MIT license.

// The same under `deno test`, `node --test` and `bun test`. Time is virtual wherever time matters.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { type AddressInfo, connect, createServer } from "node:net";
import process from "node:process";
import { Duplex, Readable, Writable } from "node:stream";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import {
  Asterisk,
  type Call,
  CallError,
  dial,
  dialStreams,
  parseDialplan,
  type Recording,
  replay,
  VirtualClock,
} from "./examples/asterisk.ts";
import { menu } from "./examples/menu.ts";
import {
  formatCommand,
  formatEvent,
  type Gathered,
  type GatherOptions,
  type IvrCommand,
  IvrError,
  type IvrErrorCode,
  type IvrEvent,
  lines,
  type Outcome,
  parseCommand,
  parseEvent,
  parseVariables,
  Session,
  type SessionOptions,
} from "./mod.ts";

// ---------------------------------------------------------------------------------------------------------
// Generators
// ---------------------------------------------------------------------------------------------------------

const SEED = Number(process.env["SEED"] ?? Date.now() % 1_000_000_007);

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

const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text);

/** A stream of these chunks. */
function streamOf(...chunks: Uint8Array[]): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const item of items) found.push(item);
  return found;
}

function code(expected: IvrErrorCode): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof IvrError && error instanceof Error);
    assert.equal(error.code, expected, error.message);
    assert.equal(error.name, "IvrError");
    return true;
  };
}

// ---------------------------------------------------------------------------------------------------------
// 1. Events
// ---------------------------------------------------------------------------------------------------------

const timestamp = 1795372496;

/** Each line as Asterisk writes it, and what it says: both directions. */
const EVENTS: [string, IvrEvent][] = [
  ...[..."0123456789*#ABCD"].map((digit): [string, IvrEvent] => [
    `${digit},1795372496`,
    { type: "dtmf", timestamp, digit: digit as "0" },
  ]),
  ["D,1795372496,vm-goodbye", { type: "dropped", timestamp, file: "vm-goodbye" }],
  ["F,1795372496,digits/1", { type: "finished", timestamp, file: "digits/1" }],
  ["F,1795372496, a,b=c ", { type: "finished", timestamp, file: " a,b=c " }],
  ["T,1795372496,beep", { type: "interrupted", timestamp, file: "beep" }],
  ["T,1795372496", { type: "interrupted", timestamp }],
  ["Z,1795372496,nosuch", { type: "failed", timestamp, reason: "nosuch" }],
  ["Z,1795372496,ANSWER_FAILURE", { type: "failed", timestamp, reason: "ANSWER_FAILURE" }],
  ["Z,1795372496", { type: "failed", timestamp }],
  ["P,1795372496,ivr://[::1]:2949,arg1,arg two,", {
    type: "params",
    timestamp,
    params: ["ivr://[::1]:2949", "arg1", "arg two", ""],
  }],
  ["G,1795372496,FOO=bar,COMMA=a,b=c,NOPE=", { type: "variables", timestamp, data: "FOO=bar,COMMA=a,b=c,NOPE=" }],
  ["I,1795372496,HANGUP", { type: "inform", timestamp, message: "HANGUP" }],
  ["H,1795372496", { type: "hangup", timestamp }],
  ["E,1795372496", { type: "exit", timestamp }],
  ["H,         1", { type: "hangup", timestamp: 1 }],
  ["H,         0", { type: "hangup", timestamp: 0 }],
  ["H,-2147483648", { type: "hangup", timestamp: -2147483648 }],
  ["1,        -1", { type: "dtmf", timestamp: -1, digit: "1" }],
  ["F,2147483647,é€", { type: "finished", timestamp: 2147483647, file: "é€" }],
];

/** Lines that mean nothing, and come back as they are. */
const STRANGE_EVENTS = [
  "",
  ",",
  "1",
  "1,",
  "1,x",
  "1,1e3",
  "1,0x10",
  "1, ",
  "1,- 1",
  "1,--1",
  "1,1 ",
  "1,1795372496,data",
  "H,1795372496,data",
  "E,1795372496,data",
  "F,1795372496",
  "F,1795372496,",
  "D,1795372496,",
  "G,1795372496",
  "P,1795372496",
  "I,1795372496",
  "Q,1795372496",
  "f,1795372496,beep",
  "12,1795372496",
  " 1,1795372496",
  "é,1795372496",
  "𝄞,1795372496",
];

test("events: the golden table, both directions, with every line break", () => {
  for (const [line, event] of EVENTS) {
    for (const end of ["", "\n", "\r\n"]) assert.deepEqual(parseEvent(line + end), event);
    assert.equal(formatEvent(event), line + "\n");
  }
});

test("events: what is not understood is unknown, with its line", () => {
  for (const line of STRANGE_EVENTS) {
    for (const end of ["", "\n", "\r\n"]) assert.deepEqual(parseEvent(line + end), { type: "unknown", line });
    assert.equal(formatEvent({ type: "unknown", line }), line + "\n");
  }
});

test("events: what the wire cannot carry is refused, and the field is named", () => {
  const refused: [string, unknown][] = [
    ["digit", { type: "dtmf", timestamp, digit: "E" }],
    ["digit", { type: "dtmf", timestamp, digit: "H" }],
    ["digit", { type: "dtmf", timestamp, digit: "12" }],
    ["digit", { type: "dtmf", timestamp, digit: "" }],
    ["timestamp", { type: "hangup", timestamp: 1.5 }],
    ["timestamp", { type: "hangup", timestamp: NaN }],
    ["timestamp", { type: "hangup", timestamp: Infinity }],
    ["timestamp", { type: "hangup" }],
    ["file", { type: "finished", timestamp, file: "" }],
    ["file", { type: "finished", timestamp }],
    ["file", { type: "dropped", timestamp, file: "a\nb" }],
    ["file", { type: "interrupted", timestamp, file: "a\rb" }],
    ["file", { type: "interrupted", timestamp, file: "" }],
    ["reason", { type: "failed", timestamp, reason: "a\0b" }],
    ["params", { type: "params", timestamp, params: [] }],
    ["params", { type: "params", timestamp, params: ["a,b"] }],
    ["data", { type: "variables", timestamp, data: "X=\ud800" }],
    ["message", { type: "inform", timestamp, message: "" }],
    ["line", { type: "unknown", line: "H,1795372496" }],
    ["line", { type: "unknown", line: "Q\n" }],
  ];
  for (const [field, event] of refused) {
    assert.throws(() => formatEvent(event as IvrEvent), (error) => {
      assert.ok(code("invalid")(error));
      assert.match((error as Error).message, new RegExp(`\\b${field}\\b`));
      return true;
    });
  }
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
    let line: string;
    try {
      line = formatEvent(event);
    } catch (error) {
      return void assert.ok(code("invalid")(error));
    }
    assert.match(line, /^[^\r\n\0]*\n$/);
    assert.deepEqual(parseEvent(line), event);
  }));

test("events: any text parses, and an unknown one is kept whole", () =>
  forAll(2000, (random) => {
    const line = random.text([...AWKWARD, "1795372496", "\n", "G,", "T,", "D,"], 12);
    const event = parseEvent(line);
    if (event.type === "unknown") assert.equal(event.line, line.replace(/\r?\n$/, ""));
    else assert.equal(parseEvent(formatTolerant(event)).type, event.type);
  }));

/** `formatEvent`, or the type alone for what only a parser takes (a newline inside of data). */
function formatTolerant(event: IvrEvent): string {
  try {
    return formatEvent(event);
  } catch {
    return EVENTS.find(([, { type }]) => type === event.type)![0];
  }
}

// ---------------------------------------------------------------------------------------------------------
// 2. Commands
// ---------------------------------------------------------------------------------------------------------

/** Each command as it goes out, and what it asks: both directions. */
const COMMANDS: [string, IvrCommand][] = [
  ["S,digits/1", { type: "play", file: "digits/1" }],
  ["S, a,b", { type: "play", file: " a,b" }],
  ["A,x", { type: "queue", file: "x" }],
  ["I,interrupt", { type: "interrupt" }],
  ["T,answer", { type: "answer" }],
  ["D,0123456789*#ABCD", { type: "dtmf", digits: "0123456789*#ABCD" }],
  ["D,1,200", { type: "dtmf", digits: "1", interval: 200 }],
  ["D,1,200,100", { type: "dtmf", digits: "1", interval: 200, duration: 100 }],
  ["D,1,,100", { type: "dtmf", digits: "1", duration: 100 }],
  ["D,1,0,0", { type: "dtmf", digits: "1", interval: 0, duration: 0 }],
  ["O,autoclear", { type: "autoclear", on: true }],
  ["O,noautoclear", { type: "autoclear", on: false }],
  ["V,A=1", { type: "set", variables: { A: "1" } }],
  ["V,A=,B=x=y, D=2,CALLERID(name)=Bob B,__X=é", {
    type: "set",
    variables: { A: "", B: "x=y", " D": "2", "CALLERID(name)": "Bob B", __X: "é" },
  }],
  ["G,A", { type: "get", names: ["A"] }],
  ["G,A, D,CALLERID(num)", { type: "get", names: ["A", " D", "CALLERID(num)"] }],
  ["P,params", { type: "params" }],
  ["L,a line, with commas", { type: "log", message: "a line, with commas" }],
  ["H,bye", { type: "hangup", message: "bye" }],
  ["E,on", { type: "exit", message: "on" }],
];

test("commands: the golden table, both directions, with every line break and with what Asterisk trims", () => {
  for (const [line, command] of COMMANDS) {
    for (const end of ["", "\n", "\r\n", " ", " \t\r\n", "\x1f\x01\n", "\0", "\0more\n"]) {
      assert.deepEqual(parseCommand(line + end), command);
    }
    assert.equal(formatCommand(command), line + "\n");
  }
});

test("commands: what Asterisk reads in other shapes too", () => {
  const read: [string, IvrCommand][] = [
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
  for (const [line, command] of read) assert.deepEqual(parseCommand(line), command);
});

test("commands: what Asterisk ignores is unknown, with its line", () => {
  const ignored = [
    ..."SAIDOVGPLHEXT",
    ...[..."SAIDOVGPLHEXT"].map((letter) => letter + ","),
    ...[..."SAIDOVGPLHEXT"].map((letter) => letter + ", \t "),
    "",
    " ",
    "s,short",
    "Q,foo",
    "   P,params",
    "O,bogus",
    "D,12x",
    "D,1,-5",
    "é,x",
    "\0S,short",
    "E,\0bye",
  ];
  for (const line of ignored) {
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

test("commands: what the wire cannot carry is refused, and the field is named", () => {
  const long = "x".repeat(1020);
  const refused: [IvrErrorCode, string, unknown][] = [
    ...["", " ", "\t", "a ", "a\n", "a\nb", "a\rb", "a\0b", "a\x1f", "\ud83d", undefined, 5].flatMap(
      (file): [IvrErrorCode, string, unknown][] => [
        ["invalid", "file", { type: "play", file }],
        ["invalid", "file", { type: "queue", file }],
        ["invalid", "message", { type: "log", message: file }],
      ],
    ),
    ["invalid", "message", { type: "hangup", message: "" }],
    ["invalid", "message", { type: "exit", message: "a\nH,b" }],
    ["invalid", "digits", { type: "dtmf", digits: "" }],
    ["invalid", "digits", { type: "dtmf", digits: "12E" }],
    ["invalid", "digits", { type: "dtmf", digits: "1,2" }],
    ["invalid", "digits", { type: "dtmf", digits: "1a" }],
    ["invalid", "interval", { type: "dtmf", digits: "1", interval: -1 }],
    ["invalid", "interval", { type: "dtmf", digits: "1", interval: 1.5 }],
    ["invalid", "duration", { type: "dtmf", digits: "1", duration: NaN }],
    ["invalid", "duration", { type: "dtmf", digits: "1", duration: Infinity }],
    ["invalid", "on", { type: "autoclear", on: "yes" }],
    ["invalid", "variables", { type: "set", variables: {} }],
    ["invalid", "variables", { type: "set", variables: { A: "1,2" } }],
    ["invalid", "variables", { type: "set", variables: { A: "1\n2" } }],
    ["invalid", "variables", { type: "set", variables: { A: "1 " } }],
    ["invalid", "variables", { type: "set", variables: { "A,B": "1" } }],
    ["invalid", "variables", { type: "set", variables: { "A=B": "1" } }],
    ["invalid", "variables", { type: "set", variables: { A: 1 } }],
    ["invalid", "names", { type: "get", names: [] }],
    ["invalid", "names", { type: "get", names: [""] }],
    ["invalid", "names", { type: "get", names: ["A,B"] }],
    ["invalid", "names", { type: "get", names: ["A=B"] }],
    ["invalid", "line", { type: "unknown", line: "H,bye" }],
    ["invalid", "line", { type: "unknown", line: "Q\nH,bye" }],
    ["too-long", "file", { type: "play", file: long + "x" }],
    ["too-long", "file", { type: "play", file: "é".repeat(510) + "x" }],
    ["too-long", "names", { type: "get", names: Array(200).fill("NAME1") }],
    ["too-long", "line", { type: "unknown", line: "Q".repeat(1023) }],
  ];
  for (const [reason, field, command] of refused) {
    assert.throws(() => formatCommand(command as IvrCommand), (error) => {
      assert.ok(code(reason)(error));
      assert.match((error as Error).message, new RegExp(`\\b${field}\\b`), JSON.stringify(command));
      return true;
    });
  }
  assert.equal(utf8(formatCommand({ type: "play", file: long })).length, 1023);
  assert.equal(utf8(formatCommand({ type: "play", file: "é".repeat(510) })).length, 1023);
});

test("commands: Latin-1 counts a byte a character, and takes no other", () => {
  assert.equal(formatCommand({ type: "play", file: "é".repeat(1020) }, "latin1").length, 1023);
  assert.throws(() => formatCommand({ type: "play", file: "é".repeat(1021) }, "latin1"), code("too-long"));
  assert.throws(() => formatCommand({ type: "play", file: "€" }, "latin1"), code("invalid"));
});

test("commands: parse undoes format, for whatever format takes", () =>
  forAll(2000, (random) => {
    const text = () => random.text(AWKWARD, 6);
    const interval = random.of([undefined, 0, 1, 250, 60000, -1, 0.5]);
    const command = random.of<() => unknown>([
      () => ({ type: random.of(["play", "queue"]), file: text() }),
      () => ({
        type: "dtmf",
        digits: random.text([..."0123456789*#ABCDw,"], 5),
        ...interval !== undefined && { interval },
      }),
      () => ({ type: "autoclear", on: random.of([true, false]) }),
      () => ({
        type: "set",
        variables: Object.fromEntries(Array.from({ length: random.below(4) }, () => [text(), text()])),
      }),
      () => ({ type: "get", names: Array.from({ length: random.below(4) }, text) }),
      () => ({ type: random.of(["log", "hangup", "exit"]), message: text() }),
      () => ({ type: random.of(["interrupt", "answer", "params"]) }),
      () => ({ type: "unknown", line: text() }),
    ])() as IvrCommand;
    let line: string;
    try {
      line = formatCommand(command);
    } catch (error) {
      return void assert.ok(code("invalid")(error));
    }
    assert.match(line, /^[^\r\n\0]*\n$/);
    assert.deepEqual(parseCommand(line), command);
  }));

test("commands: any text parses, and an unknown one is kept whole", () =>
  forAll(2000, (random) => {
    const line = random.text([...AWKWARD, ..."SAITDOVGPLHEX"], 8);
    const command = parseCommand(line);
    if (command.type === "unknown") assert.equal(command.line, line.replace(/\r?\n$/, ""));
  }));

test("variables: commas, equals signs and strange names come back whole", () => {
  const table: [string, string[], Record<string, string>][] = [
    ["A=1", ["A"], { A: "1" }],
    ["A=", ["A"], { A: "" }],
    ["A=1,2=3,B=", ["A"], { A: "1,2=3,B=" }],
    ["FOO=bar,COMMA=a,b=c,EXTEN=", ["FOO", "COMMA", "EXTEN"], { FOO: "bar", COMMA: "a,b=c", EXTEN: "" }],
    ["A=1,B=,C=x=y,D=, D=2", ["A", "B", "C", "D", " D"], { A: "1", B: "", C: "x=y", D: "", " D": "2" }],
    ["A=1,A=1", ["A", "A"], { A: "1" }],
    ["A=1,B=2,C=cu", ["A", "B", "C", "D"], { A: "1", B: "2", C: "cu" }],
    ["X=1", ["A"], {}],
    ["", ["A"], {}],
    ["A=1", [], {}],
    ["a.*=1,(=2", ["a.*", "("], { "a.*": "1", "(": "2" }],
  ];
  for (const [data, names, values] of table) assert.deepEqual(parseVariables(data, names), values);
  const proto = parseVariables("__proto__=1", ["__proto__"]);
  assert.deepEqual(Object.entries(proto), [["__proto__", "1"]]);
});

// ---------------------------------------------------------------------------------------------------------
// 3. Lines
// ---------------------------------------------------------------------------------------------------------

test("lines: the same wherever the bytes are cut", async () => {
  const text = "1,1\nF,1,é€𝄞\r\n\n\r\nG,1,X=\ufeff\nlast";
  const bytes = utf8(text);
  const expected = ["1,1", "F,1,é€𝄞", "", "", "G,1,X=\ufeff", "last"];
  for (let a = 0; a <= bytes.length; a++) {
    for (let b = a; b <= bytes.length; b++) {
      const chunks = [bytes.subarray(0, a), bytes.subarray(a, b), bytes.subarray(b)];
      assert.deepEqual(await all(lines(streamOf(...chunks))), expected);
    }
  }
  assert.deepEqual(await all(lines(streamOf(...Array.from(bytes, (_, i) => bytes.subarray(i, i + 1))))), expected);
});

test("lines: a byte order mark is data, an empty stream has no line, a newline at the end adds none", async () => {
  assert.deepEqual(await all(lines(streamOf(utf8("\ufeffa\n")))), ["\ufeffa"]);
  assert.deepEqual(await all(lines(streamOf())), []);
  assert.deepEqual(await all(lines(streamOf(utf8("\n")))), [""]);
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

test("lines: Latin-1 carries every byte as the character of its number", async () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i).filter((byte) => byte !== 10 && byte !== 13);
  const [line] = await all(lines(streamOf(bytes), { encoding: "latin1" }));
  assert.deepEqual([...line!].map((char) => char.charCodeAt(0)), [...bytes]);
});

test("lines: a line may be as long as maxLine, and the lines before a longer one come first", async () => {
  for (const pieces of [1, 3, 1000]) {
    const cut = (text: string) =>
      Array.from({ length: Math.ceil(text.length / pieces) }, (_, i) => utf8(text.slice(i * pieces, (i + 1) * pieces)));
    assert.deepEqual(await all(lines(streamOf(...cut("12345\n123\n12345")), { maxLine: 5 })), [
      "12345",
      "123",
      "12345",
    ]);
    const seen: string[] = [];
    await assert.rejects(async () => {
      for await (const line of lines(streamOf(...cut("1\n2\n123456\n3\n")), { maxLine: 5 })) seen.push(line);
    }, code("too-long"));
    assert.deepEqual(seen, ["1", "2"]);
  }
  await assert.rejects(all(lines(streamOf(utf8("x".repeat(65537))))), code("too-long"));
  assert.equal((await all(lines(streamOf(utf8("x".repeat(65536))))))[0]!.length, 65536);
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

// ---------------------------------------------------------------------------------------------------------
// 4. Session: against a host that says just what the test says
// ---------------------------------------------------------------------------------------------------------

/** A session and the other ends of its streams. */
function wired(options?: SessionOptions) {
  const events = new TransformStream<Uint8Array, Uint8Array>(undefined, undefined, { highWaterMark: 1000 });
  const commands = new TransformStream<Uint8Array, Uint8Array>(undefined, undefined, { highWaterMark: 1000 });
  const session = new Session({ readable: events.readable, writable: commands.writable }, options);
  const writer = events.writable.getWriter();
  const sent = lines(commands.readable)[Symbol.asyncIterator]();
  return {
    session,
    writer,
    say: (...texts: string[]) => void writer.write(utf8(texts.join("\n") + "\n")).catch(() => {}),
    end: () => void writer.close().catch(() => {}),
    /** The next command that is no wake-up. */
    async hears(): Promise<string> {
      for (;;) {
        const { value, done } = await sent.next();
        if (done) return "(end)";
        if (value) return value;
      }
    },
    async [Symbol.asyncDispose]() {
      const closing = session.close();
      try {
        while (!(await sent.next()).done);
      } catch { /* the session failed, and broke off */ }
      await closing;
    },
  };
}

test("session: every event reaches the iterator, once and in order", async () => {
  const host = wired();
  const stream = EVENTS.map(([line]) => line).concat(STRANGE_EVENTS);
  host.say(...stream);
  host.end();
  const expected = [...EVENTS.map(([, event]) => event), ...STRANGE_EVENTS.map((line) => ({ type: "unknown", line }))];
  assert.deepEqual(await all(host.session), expected);
  assert.deepEqual(await all(host.session), []);
  await host.session.close();
});

test("session: two waits get an event each, and a loop that was left swallows none", async () => {
  await using host = wired();
  const first = host.session[Symbol.asyncIterator]();
  const second = host.session[Symbol.asyncIterator]();
  const waits = [first.next(), second.next(), first.next(), second.next()];
  await first.return!();
  host.say("1,1", "2,1", "3,1");
  const results = await Promise.all(waits);
  assert.deepEqual(results.map(({ done, value }) => done ? "done" : (value as { digit: string }).digit), [
    "done",
    "1",
    "done",
    "2",
  ]);
  for await (const event of host.session) {
    assert.deepEqual(event, { type: "dtmf", timestamp: 1, digit: "3" });
    break;
  }
  host.say("4,1");
  assert.deepEqual((await second.next()).value, { type: "dtmf", timestamp: 1, digit: "4" });
  assert.equal((await first.next()).done, true);
});

test("session: a get asks one name a line, all at once, and takes its replies by name", async () => {
  await using host = wired();
  const got = host.session.get("A", "B", "C");
  assert.deepEqual([await host.hears(), await host.hears(), await host.hears()], ["G,A", "G,B", "G,C"]);
  host.say("G,1,B=,A=1", "G,1,C=x,y=z", "G,1,OTHER=3", "G,1,A= 1,B=2,\x01");
  assert.deepEqual(await got, { A: " 1,B=2,\x01", B: ",A=1", C: "x,y=z" });
  const iterator = host.session[Symbol.asyncIterator]();
  assert.deepEqual((await iterator.next()).value, { type: "variables", timestamp: 1, data: "OTHER=3" });
  assert.deepEqual(await host.session.get(), {});
});

test("session: a get or params sent bare has its reply in the iterator", async () => {
  await using host = wired();
  const bare = host.session.send({ type: "get", names: ["A", "B"] });
  const got = host.session.get("A");
  const params = [host.session.params(), host.session.send({ type: "params" })];
  assert.deepEqual([await host.hears(), await host.hears()], ["G,A,B", "G,A"]);
  host.say("G,1,A=1,B=2", "G,1,A=3", "P,1,ivr://x,y", "P,1,ivr://x,z");
  await bare;
  assert.deepEqual(await got, { A: "3" });
  assert.deepEqual(await params[0], ["ivr://x", "y"]);
  await params[1];
  const iterator = host.session[Symbol.asyncIterator]();
  assert.deepEqual((await iterator.next()).value, { type: "variables", timestamp: 1, data: "A=1,B=2" });
  assert.deepEqual((await iterator.next()).value, { type: "params", timestamp: 1, params: ["ivr://x", "z"] });
});

test("session: a value that may have been cut is never returned", async () => {
  for (const [size, whole] of [[2045, true], [2046, false], [2047, false]] as const) {
    await using host = wired();
    const got = host.session.get("A", "B");
    host.say("G,1,A=1", "G,1,B=" + "x".repeat(size - 2));
    if (whole) assert.equal((await got)["B"], "x".repeat(size - 2));
    else {
      await assert.rejects(got, (error) => {
        assert.ok(code("truncated")(error));
        assert.deepEqual((error as IvrError).partial, { A: "1", B: "x".repeat(size - 2) });
        return true;
      });
    }
  }
  await using host = wired();
  const got = host.session.get("B");
  host.say("G,1,B=" + "é".repeat(1022)); // 2046 bytes
  await assert.rejects(got, code("truncated"));
});

test("session: bad input rejects before a byte is sent, and nobody has to look", async () => {
  await using host = wired();
  const { session } = host;
  const bad: [IvrErrorCode, () => Promise<unknown>][] = [
    ["invalid", () => session.play("")],
    ["invalid", () => session.queue("a\nH,b")],
    ["invalid", () => session.set({ A: "1,2" })],
    ["invalid", () => session.set({})],
    ["invalid", () => session.get("GOOD", "BAD=1")],
    ["invalid", () => session.sendDtmf("12x")],
    ["invalid", () => session.sendDtmf("1", { interval: -1 })],
    ["invalid", () => session.autoclear("yes" as never)],
    ["invalid", () => session.hangup("a\nb")],
    ["invalid", () => session.exit("")],
    ["invalid", () => session.send({ type: "unknown", line: "H,x" })],
    ["too-long", () => session.set({ A: "x".repeat(1100) })],
    ["invalid", () => session.gather({ maxDigits: 0 })],
    ["invalid", () => session.gather({ maxDigits: 1.5 })],
    ["invalid", () => session.gather({ terminators: "#x" })],
    ["invalid", () => session.gather({ timeout: -1 })],
    ["invalid", () => session.gather({ timeout: NaN })],
    ["invalid", () => session.gather({ timeout: 2 ** 31 })],
    ["invalid", () => session.gather({ interDigitTimeout: -1 })],
    ["invalid", () => session.gather({ prompt: ["good", "bad\n"] })],
  ];
  for (const [reason, call] of bad) {
    call(); // nobody looks
    await assert.rejects(call(), code(reason));
  }
  session.set({ GOOD: "1" });
  assert.equal(await host.hears(), "V,GOOD=1");
});

test("session: the acknowledgement's name is unique, unset, and never seen", async () => {
  await using host = wired();
  const done = [host.session.set({ A: "1" }), host.session.log("x"), host.session.interrupt()];
  const names: string[] = [];
  for (const command of ["V,A=1", "L,x", "I,interrupt"]) {
    assert.equal(await host.hears(), command);
    const [, name] = /^G,([^,=]+)$/.exec(await host.hears())!;
    names.push(name!);
  }
  assert.equal(new Set(names).size, 3);
  for (const name of names) host.say(`G,1,${name}=`);
  await Promise.all(done);
  host.say("1,1");
  const { value } = await host.session[Symbol.asyncIterator]().next();
  assert.equal(value!.type, "dtmf");
});

test("session: a Z belongs to the command whose acknowledgement comes next", async () => {
  await using host = wired();
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
    const [, name] = /^G,(.*)$/.exec(await host.hears()) ?? [];
    if (name) acks.push(`G,1,${name}=`);
  }
  host.say(
    acks[0]!,
    "Z,1,nosuch",
    acks[1]!,
    "Z,1",
    acks[2]!,
    acks[3]!,
    "Z,1,nosuch2",
    acks[4]!,
    "Z,1,ANSWER_FAILURE",
    acks[5]!,
    "F,1,good",
  );
  const outcomes = (await results).map((result) =>
    result.status === "fulfilled" ? result.value : (result.reason as IvrError).code
  );
  assert.deepEqual(outcomes, [undefined, "missing", "refused", "finished", "refused", "refused"]);
  host.end();
  assert.deepEqual((await all(session)).map(({ type }) => type), ["failed", "failed", "failed", "failed", "finished"]);
});

test("session: files settle in the order of the playlist, also the same one three times", async () => {
  await using host = wired();
  const { session } = host;
  const outcomes: Record<string, Outcome> = {};
  const follow = (name: string, prompt: Promise<Outcome>) => void prompt.then((outcome) => outcomes[name] = outcome);
  follow("a1", session.queue("a"));
  follow("a2", session.queue("a"));
  follow("unreadable", session.queue("b"));
  follow("a3", session.queue("a"));
  follow("c", session.queue("c"));
  follow("old", session.queue("d"));
  const settled = async (line: string, ...names: string[]) => {
    host.say(line);
    await session.get("X").then(() => {}, () => {});
    assert.deepEqual(Object.keys(outcomes).sort(), names.sort());
  };
  (async () => {
    for (let line; (line = await host.hears()) !== "(end)";) {
      if (line.startsWith("G,")) host.say(`G,1,${line.slice(2)}=`);
    }
  })();
  await settled("F,1,a", "a1");
  await settled("T,1,a", "a1", "a2");
  await settled("D,1,other", "a1", "a2");
  await settled("F,1,a", "a1", "a2", "unreadable", "a3");
  await settled("T,1", "a1", "a2", "unreadable", "a3", "c");
  await session.interrupt(); // carried out, and nothing said of what waited
  assert.deepEqual(outcomes, {
    a1: "finished",
    a2: "interrupted",
    unreadable: "skipped",
    a3: "finished",
    c: "interrupted",
    old: "skipped",
  });
});

test("session: how a call ends", async () => {
  const endings: [string, (host: ReturnType<typeof wired>) => void, Awaited<Session["closed"]>][] = [
    ["the caller", ({ say, end }) => (say("H,1"), end()), { by: "caller" }],
    ["our hangup", ({ session, say, end }) => (session.hangup(), say("H,1"), end()), { by: "hangup" }],
    ["the caller, before our exit", ({ session, say, end }) => (session.exit(), say("H,1"), end()), { by: "caller" }],
    ["our exit", ({ session, say, end }) => (session.exit(), say("E,1"), end()), { by: "exit" }],
    ["without a word", ({ end }) => end(), { by: "disconnect" }],
    ["half a line", ({ writer, end }) => (writer.write(utf8("H,1")), end()), { by: "caller" }],
    ["closed by us", ({ session }) => void session.close(), { by: "disconnect" }],
    ["a reset after H", ({ say, writer }) => (say("H,1"), void setTimeout(() => writer.abort(new Error("reset")))), {
      by: "caller",
    }],
    ["a reset after our E", ({ session, writer }) => (session.exit(), void writer.abort(new Error("reset"))), {
      by: "exit",
    }],
  ];
  for (const [name, how, ending] of endings) {
    await using host = wired();
    const { session } = host;
    const pending = [session.set({ A: "1" }), session.get("A"), session.params(), session.send({ type: "answer" })];
    const prompts = [session.play("a"), session.queue("b")];
    const gathered = session.gather();
    const { signal } = session;
    how(host);
    assert.deepEqual(await session.closed, ending, name);
    for (const promise of pending) await assert.rejects(promise, code("ended"), name);
    assert.deepEqual(await Promise.all(prompts), ["ended", "ended"]);
    assert.deepEqual(await gathered, { digits: "", reason: "hangup" });
    assert.ok(signal.aborted);
    await assert.rejects(session.set({ A: "1" }), code("ended"));
    assert.equal(await session.queue("a"), "ended");
    assert.deepEqual(await session.gather(), { digits: "", reason: "hangup" });
    await Promise.all([session.hangup(), session.exit(), session.close(), session.close()]);
    for await (const event of session) assert.ok(event);
  }
});

test("session: a stream that fails ends the call with its error, after the events before it", async () => {
  const reset = new Error("reset");
  await using host = wired();
  const pending = host.session.set({ A: "1" });
  host.say("1,1");
  setTimeout(() => host.writer.abort(reset));
  const seen: IvrEvent[] = [];
  await assert.rejects(async () => {
    for await (const event of host.session) seen.push(event);
  }, reset);
  assert.equal(seen.length, 1);
  assert.deepEqual(await host.session.closed, { by: "error", error: reset });
  await assert.rejects(pending, (error) => code("ended")(error) && (error as Error).cause === reset);
});

test("session: H that arrives with a reset of the commands is still the caller's", async () => {
  let fail = (_: Error): void => {};
  const events = new TransformStream<Uint8Array, Uint8Array>();
  const writer = events.writable.getWriter();
  const session = new Session({
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

test("session: more events than maxQueue fail it, once the iterator has had them; a line too long does as well", async () => {
  for (
    const [reason, text] of [["overflow", "1,1\n".repeat(12)], [
      "too-long",
      "1,1\n".repeat(11) + "x".repeat(200),
    ]] as const
  ) {
    await using host = wired({ maxQueue: 11, maxLine: 100 });
    host.writer.write(utf8(text)).catch(() => {});
    const ending = await host.session.closed;
    assert.equal(ending.by, "error");
    assert.ok(code(reason)(ending.error));
    let seen = 0;
    await assert.rejects(async () => {
      for await (const _ of host.session) seen++;
    }, code(reason));
    assert.equal(seen, text.split("\n").length - 1);
  }
});

test("session: a consumer that keeps up never overflows, however fast the bytes come", async () => {
  const host = wired({ maxQueue: 10 });
  const text = "1,1795372496\nF,1795372496,beep\n".repeat(50_000);
  host.writer.write(utf8(text)).catch(() => {});
  host.end();
  let seen = 0;
  for await (const event of host.session) seen += event.type === "dtmf" || event.type === "finished" ? 1 : 0;
  assert.equal(seen, 100_000);
  assert.deepEqual(await host.session.closed, { by: "disconnect" });
  await host.session.close();
});

test("session: Latin-1 carries every byte both ways", async () => {
  const bytes = Uint8Array.from({ length: 255 }, (_, i) => i + 1).filter((byte) => ![10, 13, 44].includes(byte));
  const text = String.fromCharCode(...bytes) + "!";
  let sent: Uint8Array = new Uint8Array();
  const session = new Session({
    readable: streamOf(utf8("G,1,X="), bytes, utf8("!\n")),
    writable: new WritableStream({ write: (chunk) => void (sent = Uint8Array.of(...sent, ...chunk)) }),
  }, { encoding: "latin1" });
  session.set({ X: text });
  const got = session.get("X");
  await session.close();
  assert.ok(String.fromCharCode(...sent).startsWith(`V,X=${text}\nG,`));
  await assert.rejects(session.set({ X: "€" }), code("invalid"));
  await assert.rejects(got, code("ended"));
});

test("session: log takes any text, in lines that fit", () =>
  forAll(60, async (random) => {
    for (const encoding of ["utf-8", "latin1"] as const) {
      const session = new Session(
        { readable: new ReadableStream(), writable: new WritableStream({ write: (chunk) => void chunks.push(chunk) }) },
        { encoding },
      );
      const chunks: Uint8Array[] = [];
      const text = random.text([...AWKWARD, "x".repeat(900), "é€𝄞".repeat(200)], 6);
      session.log(text);
      await session.close();
      const decoder = new TextDecoder(encoding);
      const said = chunks.map((chunk) => decoder.decode(chunk)).join("").split("\n").filter((line) =>
        !/^G,|^$/.test(line)
      );
      for (const line of said) {
        assert.match(line, /^L,.*[^ ]$/);
        assert.ok((encoding === "utf-8" ? utf8(line) : line).length <= 1022);
      }
      const letters = (text: string) => text.replace(/[\s\0-\x1f\x7f]+/g, "").replace(/\p{Surrogate}/gu, "?");
      if (encoding === "utf-8") assert.equal(letters(said.map((line) => line.slice(2)).join("")), letters(text));
    }
  }));
