// Copyright 2026 the ExternalIVR authors. MIT license.

// What the module costs, as ratios that were taken in one run: medians of interleaved rounds. The same on the three runtimes:
// `deno task bench`, `node protocol_bench.ts` (24), `bun protocol_bench.ts`. Parts by name: `protocol_bench.ts parsing memory`.

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { Duplex, Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import { formatCommand, formatEvent, Ivr, type IvrEvent, lines, parseCommand, parseEvent, Session } from "./mod.ts";

const runtime = "Deno" in globalThis ? "deno" : "Bun" in globalThis ? "bun" : "node";
const self = fileURLToPath(import.meta.url);

/** How this runtime runs a file, with a collector that can be called. */
const flags = {
  deno: ["run", "--quiet", "--no-check", "--allow-all", "--v8-flags=--expose-gc"],
  node: ["--expose-gc"],
  bun: [],
}[runtime];

/** The bound of each figure: on Deno, Node and Bun. */
type Bound = readonly [deno: number, node: number, bun: number];

function report(what: string, value: number, unit = "", bound?: Bound, most = true): void {
  const limit = bound?.[["deno", "node", "bun"].indexOf(runtime)];
  const verdict = limit === undefined
    ? ""
    : `  ${most ? "<=" : ">="} ${limit} ${(most ? value <= limit : value >= limit) ? "" : "  MISSED"}`;
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  console.log(`  ${what.padEnd(66)} ${value.toFixed(digits).padStart(9)} ${unit.padEnd(4)}${verdict}`);
}

const median = (values: number[]): number => values.toSorted((a, b) => a - b)[values.length >> 1]!;

/** Times several ways of doing the same in turn, and gives for each the milliseconds of every round. */
async function rounds<Name extends string>(
  count: number,
  ways: Record<Name, () => unknown>,
): Promise<Record<Name, number[]>> {
  const times = {} as Record<Name, number[]>;
  for (let round = -2; round < count; round++) { // two to warm up
    for (const name of Object.keys(ways) as Name[]) {
      const began = performance.now();
      await ways[name]();
      if (round >= 0) (times[name] ??= []).push(performance.now() - began);
    }
  }
  return times;
}

/** The median of the ratios, round by round: `a` times as long as `b`. */
const ratio = (a: number[], b: number[]): number => median(a.map((time, i) => time / b[i]!));

// ---------------------------------------------------------------------------------------------------------

const LINES = [
  "1,1795372496",
  "F,1795372496,digits/1",
  "#,1795372496",
  "T,1795372496,vm-enter-num-to-call",
  "7,1795372497",
  "G,1795372497,ACCOUNT=12345678",
  "D,1795372497,beep",
  "0,1795372498",
];
const bytes = new TextEncoder().encode(`${LINES.join("\n")}\n`.repeat(150_000));
const EVENTS = LINES.length * 150_000;

function cutInto(size: number): Uint8Array[] {
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.subarray(i * size, (i + 1) * size));
}

function stream(chunks: Uint8Array[]): ReadableStream<Uint8Array> {
  let i = 0;
  return new ReadableStream({
    pull: (controller) => i < chunks.length ? controller.enqueue(chunks[i++]!) : controller.close(),
  });
}

const check = (seen: number, expected = EVENTS): void => {
  if (seen !== expected) throw new Error(`${seen} events, not ${expected}`);
};

async function viaSession(chunks: Uint8Array[], expected = EVENTS): Promise<void> {
  let seen = 0;
  for await (const _ of new Session({ readable: stream(chunks), writable: new WritableStream() })) seen++;
  check(seen, expected);
}

/** What one writes without this module: the three fields of a line, the timestamp as a number. */
function bySplit(line: string): { tag?: string; timestamp: number; data?: string } {
  const [tag, timestamp, data] = line.split(",");
  return { tag, timestamp: Number(timestamp), data };
}

const byLine = (chunks: Uint8Array[]) =>
  createInterface({ input: Readable.fromWeb(stream(chunks) as Parameters<typeof Readable.fromWeb>[0]) });

async function viaReadline(chunks: Uint8Array[]): Promise<void> {
  let seen = 0;
  for await (const line of byLine(chunks)) if (bySplit(line).timestamp) seen++;
  check(seen);
}

/** Without the iterator's back pressure: nothing may take its time here. */
async function viaLineEvents(chunks: Uint8Array[]): Promise<void> {
  let seen = 0;
  const lines = byLine(chunks).on("line", (line) => {
    if (bySplit(line).timestamp) seen++;
  });
  await new Promise((resolve) => lines.once("close", resolve));
  check(seen);
}

async function viaTransforms(chunks: Uint8Array[]): Promise<void> {
  let rest = "";
  const cutting = new TransformStream<string, string>({
    transform(text, controller) {
      const parts = (rest + text).split("\n");
      rest = parts.pop()!;
      for (const part of parts) controller.enqueue(part);
    },
  });
  let seen = 0;
  const decoding = new TextDecoderStream() as unknown as TransformStream<Uint8Array, string>;
  for await (const line of stream(chunks).pipeThrough(decoding).pipeThrough(cutting)) {
    if (bySplit(line).timestamp) seen++;
  }
  check(seen);
}

/** Nothing but decode, cut, parse: the least that an async iterator over these objects can do. */
function bare(readable: ReadableStream<Uint8Array>): AsyncIterableIterator<IvrEvent, undefined> {
  const reader = readable.getReader();
  const decoder = new TextDecoder();
  let events: IvrEvent[] = [];
  let at = 0;
  let rest = "";
  const more = async (): Promise<IteratorResult<IvrEvent, undefined>> => {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return { done, value: undefined };
      const text = decoder.decode(value, { stream: true });
      events = [];
      at = 0;
      let from = 0;
      for (let to; (to = text.indexOf("\n", from)) >= 0; from = to + 1) {
        events.push(parseEvent(rest + text.slice(from, to)));
        rest = "";
      }
      rest += text.slice(from);
      if (events.length) return { done: false, value: events[at++]! };
    }
  };
  return {
    next: () => at < events.length ? Promise.resolve({ done: false, value: events[at++]! }) : more(),
    [Symbol.asyncIterator]() {
      return this;
    },
  };
}

async function viaBare(chunks: Uint8Array[], expected = EVENTS): Promise<void> {
  let seen = 0;
  for await (const _ of bare(stream(chunks))) seen++;
  check(seen, expected);
}

async function viaCallback(chunks: Uint8Array[]): Promise<void> {
  let seen = 0;
  const count = (_: IvrEvent) => seen++;
  const reader = stream(chunks).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (let chunk; !(chunk = await reader.read()).done;) {
    const text = decoder.decode(chunk.value, { stream: true });
    let from = 0;
    for (let to; (to = text.indexOf("\n", from)) >= 0; from = to + 1) {
      count(parseEvent(rest + text.slice(from, to)));
      rest = "";
    }
    rest += text.slice(from);
  }
  check(seen);
}

/** What reading costs at all: read, decode, look for the newline. */
async function viaFloor(chunks: Uint8Array[], expected: number): Promise<void> {
  let seen = 0;
  const reader = stream(chunks).getReader();
  const decoder = new TextDecoder();
  for (let chunk; !(chunk = await reader.read()).done;) {
    if (decoder.decode(chunk.value, { stream: true }).indexOf("\n") >= 0) seen++;
  }
  check(seen, expected);
}

async function throughput(): Promise<void> {
  console.log("\nevents through the iterator");
  for (const size of [65536, 1460]) {
    const chunks = cutInto(size);
    const { session, readline, events, transforms, hand, callback } = await rounds(9, {
      session: () => viaSession(chunks),
      readline: () => viaReadline(chunks),
      events: () => viaLineEvents(chunks),
      transforms: () => viaTransforms(chunks),
      hand: () => viaBare(chunks),
      callback: () => viaCallback(chunks),
    });
    const big = size === 65536;
    console.log(`  chunks of ${size} bytes: ${(EVENTS / median(session) / 1000).toFixed(2)} million events a second`);
    report(
      "times readline + split and Number",
      ratio(readline, session),
      "x",
      big ? [2.5, 1.6, 1.9] : undefined,
      false,
    );
    report("times readline's line event + split and Number", ratio(events, session), "x");
    report("times TextDecoderStream + TransformStream + split and Number", ratio(transforms, session), "x");
    report(
      "share of a bare iterator over the same objects",
      ratio(hand, session),
      "",
      big ? [0.9, 0.9, 0.9] : undefined,
      false,
    );
    report("share of a callback loop", ratio(callback, session));
  }
}

/** What Asterisk's writes look like: each line comes alone. */
async function oneByOne(): Promise<void> {
  console.log("\nevents through the iterator, one line a chunk");
  const each = LINES.map((line) => new TextEncoder().encode(line + "\n"));
  const chunks = Array.from({ length: 200_000 }, (_, i) => each[i % each.length]!);
  const { session, hand, floor } = await rounds(9, {
    session: () => viaSession(chunks, chunks.length),
    hand: () => viaBare(chunks, chunks.length),
    floor: () => viaFloor(chunks, chunks.length),
  });
  report("times the floor (read, decode, indexOf)", ratio(session, floor), "x", [1.8, 2, 1.8]);
  report("the bare iterator times the floor", ratio(hand, floor), "x");
}

// ---------------------------------------------------------------------------------------------------------

async function parsing(): Promise<void> {
  console.log("\nthe codec");
  const count = 200_000;
  // Each line once: a runtime may remember what the same string was split into
  const fresh = (lines: string[]) =>
    Array.from({ length: count }, (_, i) => lines[i % lines.length]!).join("\n").replace(
      /1795372\d\d\d/g,
      () => `${1795000000 + n++}`,
    ).split("\n");
  let n = 0;
  const commands = ["S,digits/1", "V,ACCOUNT=12345678", "G,ACCOUNT", "A,vm-enter-num-to-call", "L,a line"];
  const parsed = { events: LINES.map(parseEvent), commands: commands.map(parseCommand) };
  let sink = 0;
  const each = <T>(items: T[], work: (item: T) => unknown) => () => {
    for (let i = 0; i < count; i++) if (work(items[i % items.length]!)) sink++;
  };
  const eventLines = fresh(LINES);
  const commandLines = fresh(commands);
  const { split, parse, command, format, event } = await rounds(15, {
    split: each(eventLines, bySplit),
    parse: each(eventLines, parseEvent),
    command: each(commandLines, parseCommand),
    format: each(parsed.commands, (command) => formatCommand(command)),
    event: each(parsed.events, formatEvent),
  });
  const ns = (times: number[]) => median(times) / count * 1e6;
  report("parseEvent, times a bare split and Number", ratio(split, parse), "x", [1.5, 1.5, 1.5], false);
  report("parseEvent", ns(parse), "ns");
  report("parseCommand", ns(command), "ns");
  report("formatCommand, checked by reading it back", ns(format), "ns");
  report("formatEvent, checked by reading it back", ns(event), "ns");
  check(sink / count / 5, 17);
}

// ---------------------------------------------------------------------------------------------------------

const IDLE = 10_000;

/** In a process of its own: what so many pairs of streams take, bare or with a session each. */
async function idle(kind: string): Promise<void> {
  const collect = () =>
    "Bun" in globalThis
      ? (globalThis as unknown as { Bun: { gc(force: boolean): void } }).Bun.gc(true)
      : (globalThis as { gc?(): void }).gc?.();
  const settle = async () => {
    for (let i = 0; i < 5; i++) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      collect();
    }
    return process.memoryUsage();
  };
  const kept: unknown[] = [];
  const make = () => {
    const streams = { readable: new ReadableStream<Uint8Array>(), writable: new WritableStream<Uint8Array>() };
    if (kind === "session") return new Session(streams);
    const reader = streams.readable.getReader();
    return [reader, streams.writable.getWriter(), reader.read()];
  };
  for (let i = 0; i < 100; i++) kept.push(make());
  const before = await settle();
  for (let i = 0; i < IDLE; i++) kept.push(make());
  const after = await settle();
  console.log(
    JSON.stringify({
      heap: (after.heapUsed - before.heapUsed) / IDLE,
      rss: (after.rss - before.rss) / IDLE,
      kept: kept.length,
    }),
  );
}

function memory(): void {
  console.log(`\nmemory of ${IDLE} idle sessions`);
  const measure = (kind: string): { heap: number; rss: number } =>
    JSON.parse(spawnSync(process.execPath, [...flags, self, "--idle", kind], { encoding: "utf8" }).stdout);
  const pairs = Array.from({ length: 5 }, () => [measure("session"), measure("bare")] as const);
  const of = (field: "heap" | "rss") => median(pairs.map(([session, bare]) => session[field] / bare[field]));
  report("an idle session, times the bare pair of streams: heap", of("heap"), "x", [1.3, 1.3, 1.5]);
  report("resident memory", of("rss"), "x");
  report("a session over its streams", median(pairs.map(([session, bare]) => session.heap - bare.heap)), "B");
}

// ---------------------------------------------------------------------------------------------------------

/** A host that answers every `G`, `E` and nothing else, at once: Asterisk without its stall. */
function answerTo(text: string): string {
  let answer = "";
  for (const line of text.split("\n")) {
    if (line.startsWith("G,")) answer += `G,1795372496,${line.slice(2)}=\n`;
    else if (line.startsWith("E,")) answer += "E,1795372496\n";
  }
  return answer;
}

async function latency(): Promise<void> {
  console.log("\none acknowledged command over loopback TCP, over a bare echo of the same bytes");
  const server = createServer({ noDelay: true, allowHalfOpen: true }, (socket) => {
    let echo: boolean | undefined;
    socket.on("data", (data) => {
      echo ??= data[0] === 0x21;
      socket.write(echo ? data : answerTo(String(data)));
    }).on("end", () => socket.end()).on("error", () => {});
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const dial = async () => {
    const socket = connect({ port, host: "127.0.0.1", noDelay: true, allowHalfOpen: true });
    await new Promise((resolve) => socket.once("connect", resolve));
    return Duplex.toWeb(socket as Socket);
  };
  const message = new TextEncoder().encode("!,A=1\nG,EIVR_ACK_100\n");
  const echo = await dial();
  const [reader, writer] = [echo.readable.getReader(), echo.writable.getWriter()];
  const echoed = async () => {
    writer.write(message);
    for (let seen = 0; seen < message.length;) seen += ((await reader.read()).value as Uint8Array).length;
  };
  const session = new Ivr(await dial());
  const others: Ivr[] = [];
  for (const load of [0, 1000]) {
    while (others.length < load) others.push(new Ivr(await dial()));
    const { acknowledged, bare } = await rounds(2000, { acknowledged: () => session.set({ A: "1" }), bare: echoed });
    const at = (times: number[], share: number) => times.toSorted((a, b) => a - b)[Math.floor(times.length * share)]!;
    const name = load ? `with ${load} other calls in the process` : "alone";
    report(`p50, ${name}`, at(acknowledged, 0.5) / at(bare, 0.5), "x", [2, 2, 2]);
    report(`p99, ${name}`, at(acknowledged, 0.99) / at(bare, 0.99), "x");
    report(`p50, ${name}`, at(acknowledged, 0.5) * 1000, "us");
  }
  await Promise.all([session, ...others].map((session) => session.close()));
  await writer.close();
  await new Promise((resolve) => server.close(resolve));
}

// ---------------------------------------------------------------------------------------------------------

/** A call over streams in memory, with a host that is no more than it has to be. */
async function wholeCall(): Promise<void> {
  let tell!: ReadableStreamDefaultController<Uint8Array>;
  const decoder = new TextDecoder();
  const encoder = new TextEncoder();
  const session = new Ivr({
    readable: new ReadableStream({ start: (controller) => void (tell = controller) }),
    writable: new WritableStream({
      write(chunk) {
        const answer = answerTo(decoder.decode(chunk));
        if (answer) tell.enqueue(encoder.encode(answer));
        if (answer.startsWith("E")) tell.close();
      },
    }),
  });
  for (const key of "1234#") tell.enqueue(encoder.encode(`${key},1795372496\n`));
  const { digits } = await session.gather();
  await session.set({ ACCOUNT: digits });
  await session.exit();
}

async function calls(): Promise<void> {
  const count = 10_000;
  console.log(`\n${count} calls at once in one process: keys in, set acknowledged, exit`);
  const times: number[] = [];
  let peak = 0;
  for (let round = 0; round < 3; round++) {
    const began = performance.now();
    const under = Array.from({ length: count }, wholeCall);
    await Promise.race(under);
    peak = Math.max(peak, process.memoryUsage().rss);
    await Promise.all(under);
    times.push(performance.now() - began);
  }
  report("calls a second", count / median(times) * 1000);
  report("peak of resident memory", peak / 2 ** 20, "MiB");
}

// ---------------------------------------------------------------------------------------------------------

async function startUp(): Promise<void> {
  console.log("\nstart-up");
  const folder = mkdtempSync(join(tmpdir(), "externalivr-"));
  const source = new URL("./mod.ts", import.meta.url);
  // Node as JSR serves it, without types: to strip them takes Node longer than anything here
  const { stripTypeScriptTypes } = await import("node:module") as { stripTypeScriptTypes?: (code: string) => string };
  const served = runtime === "node" ? stripTypeScriptTypes!(readFileSync(source, "utf8")) : undefined;
  if (served) writeFileSync(join(folder, "mod.mjs"), served);
  const mod = served ? "./mod.mjs" : source.href;
  const streams = `import process from "node:process";
import { Readable, Writable } from "node:stream";
const readable = Readable.toWeb(process.stdin);
const writable = Writable.toWeb(process.stdout);
`;
  const scripts = {
    empty: "export {};\n",
    imports: `import { Session } from "${mod}";\nif (!Session) throw 0;\n`,
    reads: `${streams}await readable.getReader().read();\nwritable.getWriter();\nprocess.exit();\n`,
    answers:
      `import { Session } from "${mod}";\n${streams}for await (const event of new Session({ readable, writable })) process.exit();\n`,
  };
  for (const [name, script] of Object.entries(scripts)) writeFileSync(join(folder, `${name}.mjs`), script);
  const run = (name: string) => () => {
    const { status, stderr } = spawnSync(process.execPath, [...flags, join(folder, `${name}.mjs`)], {
      input: "1,1795372496\n",
    });
    if (status !== 0) throw new Error(String(stderr));
  };
  const { empty, imports, reads, answers } = await rounds(25, {
    empty: run("empty"),
    imports: run("imports"),
    reads: run("reads"),
    answers: run("answers"),
  });
  rmSync(folder, { recursive: true });
  const over = (a: number[], b: number[]) => median(a.map((time, i) => time - b[i]!));
  report("import, over an empty script", over(imports, empty), "ms", [5, 5, 5]);
  report("first event on stdio, over a script that reads it bare", over(answers, reads), "ms");
}

// ---------------------------------------------------------------------------------------------------------

async function growth(): Promise<void> {
  console.log("\ngrowth: flat is 1");
  const queued = (count: number) => {
    const chunk = new TextEncoder().encode(`${LINES[1]}\n`.repeat(1000));
    return async () => {
      const sessions = Array.from({ length: 100_000 / count }, () => {
        const readable = new ReadableStream<Uint8Array>({
          start(controller) {
            for (let i = 0; i < count; i += 1000) controller.enqueue(chunk);
          },
        });
        return new Session({ readable, writable: new WritableStream() }, { maxBuffer: 1e8 });
      });
      await new Promise((resolve) => setTimeout(resolve)); // all of them wait
      let seen = 0;
      for (const session of sessions) {
        const events = session[Symbol.asyncIterator]();
        for (let i = 0; i < count; i++) if ((await events.next()).value) seen++;
      }
      check(seen, 100_000);
    };
  };
  const queues = await rounds(9, { thousand: queued(1000), many: queued(100_000) });
  report("time per event with 100,000 in the queue, times with 1,000", ratio(queues.many, queues.thousand), "x");

  const trickle = (size: number) => {
    const line = new TextEncoder().encode("x".repeat(size - 1) + "\n");
    const chunks = Array.from({ length: 65536 }, (_, i) => line.subarray(i % size, i % size + 1));
    return async () => {
      let seen = 0;
      for await (const _ of lines(stream(chunks))) seen++;
      check(seen, 65536 / size);
    };
  };
  const { k1, k4, k16, k64 } = await rounds(7, {
    k1: trickle(1024),
    k4: trickle(4096),
    k16: trickle(16384),
    k64: trickle(65536),
  });
  for (const [name, times] of Object.entries({ "4": k4, "16": k16, "64": k64 })) {
    report(`time per byte of a line that trickles in, ${name} KiB times 1 KiB`, ratio(times, k1), "x");
  }
}

// ---------------------------------------------------------------------------------------------------------

function sizes(): void {
  console.log("\nsize, minified and gzipped");
  const source = readFileSync(new URL("./mod.ts", import.meta.url), "utf8");
  const measure = (code: string) => {
    const { stdout, status } = spawnSync("npx", ["-y", "esbuild@0.25.12", "--minify", "--loader=ts", "--format=esm"], {
      input: code,
      shell: process.platform === "win32",
    });
    return status === 0 ? spawnSync("gzip", ["-9"], { input: stdout }).stdout?.length ?? NaN : NaN; // zlibs differ
  };
  const before = (heading: string) => source.slice(0, source.indexOf(heading)); // which uses nothing of what stands below
  report("the codec alone", measure(before("// 3. Lines")), "B", [1850, 1850, 1850]);
  report("the codec and Session", measure(before("// 5. Ivr")), "B", [3500, 3500, 3500]);
  report("everything", measure(source), "B", [5000, 5000, 5000]);
}

// ---------------------------------------------------------------------------------------------------------

const parts = { throughput, oneByOne, parsing, memory, latency, calls, startUp, growth, sizes };
const names = process.argv.slice(2);
const run = parts[names[0] as keyof typeof parts];
if (names[0] === "--idle") await idle(names[1]!);
else if (run && names.length === 1) await run();
else {
  console.log(`${runtime} ${process.versions[runtime as "node"] ?? process.version}`);
  // Each in a process of its own: what one part has taught the compiler is neither the luck nor the burden of the next
  for (const name of names.length ? names : Object.keys(parts)) {
    if (!(name in parts)) throw new Error(`No part is called ${name}: ${Object.keys(parts).join(", ")}`);
    const { status } = spawnSync(process.execPath, [...flags, self, name], { stdio: "inherit" });
    if (status !== 0) process.exit(status ?? 1);
  }
}
