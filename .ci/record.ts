// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Records what crosses the wire between the live Asterisk and a bare TCP client, or a program. `deno task record` makes the files of
 * `examples/wire` anew: what they say of the call, its caller and its steps is the scenario, the rest is measured.
 *
 * @module
 */

import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { isDeepStrictEqual } from "node:util";
import { formatRecording, type Recording } from "../examples/asterisk.ts";
import { Live } from "./asterisk.ts";

/** A recording as it lies in its file. */
export interface RecordingFile extends Recording {
  /** The name of the file. */
  name: string;
  /** What it shows. */
  title: string;
  /** Asterisk's version. */
  asterisk: string;
}

/** How long after its last step a call is given up that does not end, in milliseconds. */
const ENDLESS = 5000;

const wire = new URL("../examples/wire/", import.meta.url);

/** Does what it is told over TCP. */
const PROGRAM = fileURLToPath(new URL("program", import.meta.url));

/** The recordings of the project. */
export function recordings(): RecordingFile[] {
  return readdirSync(wire).sort().map((file) => JSON.parse(readFileSync(new URL(file, wire), "utf8")));
}

/** Plays the scenario of a recording with the live Asterisk, and records it anew. */
export async function record(live: Live, scenario: RecordingFile): Promise<RecordingFile> {
  const { application, args, options, variables, globals, caller, steps } = scenario;
  const connected = Promise.withResolvers<{ socket: Socket; began: number }>();
  const server = createServer({ noDelay: true, allowHalfOpen: true }, (socket) => {
    connected.resolve({ socket, began: performance.now() });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const program = !application.startsWith("ivr://");
  const here = program ? PROGRAM : application.replace(/\d+$/, String(port));
  const params = program ? [String(port), ...args] : args;

  for (const [name, value] of Object.entries(globals)) await live.setGlobal(name, value);
  const sent = steps.map(([, text, to]) => to ? "" : text).join("");
  const set = (sent.match(/(?<=^V,).*/gm) ?? []).join().split(",");
  const call = await live.call(`ExternalIVR(${here}${params.length ? `(${params})` : ""}${options && `,${options}`})`, {
    variables,
    names: [...new Set(set.map((pair) => pair.replace(/=.*|^__?/g, "")))],
    dead: options.includes("d"),
  });

  const { socket, began } = await Promise.race([connected.promise, call.over.then(unanswered)]);
  const now = () => Math.round(performance.now() - began) / 1000;
  const received: [number, string][] = [];
  let ended: [number, string] | null = null;
  const over = new AbortController();
  const end = (how: string) => {
    ended ??= [now(), how];
    over.abort();
  };
  let rest = "";
  socket.setEncoding("latin1").on("data", (data) => {
    const lines = (rest + data).split("\n");
    rest = lines.pop()!;
    for (const line of lines) received.push([now(), line.replaceAll(program ? `${here},${port}` : here, application)]);
    if (program && rest === "\0") end("end");
  });
  socket.on("end", () => end("end")).on("error", () => end("reset"));

  const acting = call.plan(caller, began);
  const wait = (ms: number) => sleep(Math.max(0, ms), undefined, { signal: over.signal }).catch(() => {});
  const closed = new Set<string>();
  for (const [at, text, to = "stdout"] of steps) {
    await wait(began + at * 1000 - performance.now());
    if (text === "" || closed.has(to)) continue;
    if (text === null) closed.add(to);
    const descriptor = to === "stderr" ? 2 : 1;
    if (program) socket.write(text === null ? `${descriptor}\n` : `${descriptor} ${text.length}\n${text}`, "latin1");
    else if (text === null) socket.end();
    else socket.write(text, "latin1");
  }
  if (!ended) await wait(ENDLESS);
  const recorded = { received: [...received], ended };
  socket.end(program ? "exit\n" : "");

  const { log, variables: values } = await call.over;
  await acting;
  await new Promise((resolve) => server.close(resolve));
  const changed = Object.entries(values).filter(([name, value]) => value && value !== variables[name]);
  return {
    ...scenario,
    asterisk: /^\d+/.exec(await live.version())![0],
    ...recorded,
    log: log.map((line) => line === "CONTINUED" ? `${line} ${changed.map((pair) => pair.join("=")).join(" ")}` : line),
  };
}

/** All that a recording tells but when it was, and with which Asterisk. */
export function untimed({ asterisk: _, received, ended, ...rest }: RecordingFile): unknown {
  const line = (text: string) => text.replace(/^(.), *-?\d+/, "$1");
  return { ...rest, received: received.map(([, text]) => line(text)), ended: ended && ended[1] };
}

function unanswered(): never {
  throw new Error("Asterisk did not connect");
}

if (import.meta.main) {
  const live = await Live.connect();
  await Promise.all(
    recordings().map(async (then) => {
      const now = await record(live, then);
      writeFileSync(new URL(`${now.name}.json`, wire), formatRecording(now));
      const same = isDeepStrictEqual(untimed(now), untimed(then));
      console.log(`${now.name}: ${same ? "the same but for times" : "it changed"}`);
    }),
  );
  await live.close();
}
