#!/usr/bin/env -S deno run --quiet --allow-net
// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The IVR that everybody writes: it greets, asks for an account number and for a department, tells the dialplan
 * both, and goes on there. One file for Deno, Bun and Node 24, as a program or as a server:
 *
 * ```
 * exten => 100,1,ExternalIVR(/path/menu.ts(sales))          ; the program, by the first line of this file
 * exten => 101,1,ExternalIVR(/usr/bin/node(/path/menu.ts))  ; the same on Node
 * exten => 102,1,ExternalIVR(ivr://localhost(sales))        ; the server: menu.ts --listen [host:port] [--max-calls n]
 * ```
 *
 * The first argument is the department for callers who press nothing. The dialplan finds `ACCOUNT` and `DEPARTMENT`.
 *
 * @module
 */

import type { AddressInfo } from "node:net";
import type { Readable, Writable } from "node:stream";
import { answer, type Ivr, type Sink, type Source } from "../mod.ts";
import * as say from "./say.ts";

/** The way to what Node calls built in. Imports of it would keep the menu out of Workers, which have no `process` either. */
const { process } = globalThis;

const DEPARTMENTS: Record<string, string> = { "1": "sales", "2": "support" };

/** The whole menu, for one call. */
export async function menu(ivr: Ivr): Promise<void> {
  const department = (await ivr.params()).filter((param) => Object.values(DEPARTMENTS).includes(param)).at(-1);

  const account = await ask(ivr, ["hello-world", "agent-user"], 8, (digits) => digits.length >= 4);
  if (account) await ivr.set({ ACCOUNT: account });

  const key = account &&
    await ask(ivr, ["vm-press", "digits/1", "digits/2"], 1, (digit) => digit in DEPARTMENTS);
  const choice = key ? DEPARTMENTS[key] : department;
  if (choice) await ivr.set({ DEPARTMENT: choice });

  await ivr.log(`account ${account ? "known" : "unknown"}, department ${choice ?? "unknown"}`);
  if (account) {
    for (const file of say.alpha(account)) ivr.queue(file); // as digits, but a telephone may have the keys A to D
    await ivr.queue("auth-thankyou");
  }
  await ivr.exit();
}

/** Asks up to three times. A caller who is gone answers nothing. */
async function ask(
  ivr: Ivr,
  prompt: string[],
  maxDigits: number,
  valid: (digits: string) => boolean,
): Promise<string> {
  for (let tries = 0; tries < 3 && !ivr.signal.aborted; tries++) {
    const { digits } = await ivr.gather({ prompt, maxDigits, timeout: 4000 });
    if (valid(digits)) return digits;
    if (digits) ivr.queue("pbx-invalid");
  }
  return "";
}

/**
 * Node's streams as `answer` takes them, with no more of the web's than it uses: theirs take several times the memory, and
 * `Duplex.toWeb` of Deno ends the whole process when a peer resets its connection. A write comes behind what has arrived:
 * where Asterisk is gone it fails and takes the rest of the input with it, the last words of the call among it.
 */
export function nodeStreams(input: Readable, output: Writable): { readable: Source; writable: Sink } {
  let broken = false;
  output.on("error", () => broken = true); // the write that fails says so
  const chunks: AsyncIterator<Uint8Array, undefined> = input[Symbol.asyncIterator]();
  const reader = {
    read: async () => {
      const { done = false, value } = await chunks.next();
      return { done, value };
    },
    cancel: () => Promise.resolve(void input.destroy()),
    releaseLock: () => {},
  };
  const writer = {
    write: (chunk: Uint8Array) =>
      new Promise<void>((resolve, reject) => {
        setImmediate(() => output.write(chunk, (error) => error ? reject(error) : resolve()));
      }),
    close: () => new Promise<void>((resolve) => broken ? resolve() : output.end(resolve)), // a broken stdout never calls back
    abort: () => Promise.resolve(void output.destroy()),
  };
  return { readable: { getReader: () => reader }, writable: { getWriter: () => writer } };
}

/** The same for Deno's connections, whose own streams keep 64 KiB ready for each read. */
function denoStreams(conn: Deno.TcpConn): { readable: Source; writable: Sink } {
  const chunk = new Uint8Array(1024); // which is read before the next one is asked for
  const reader = {
    async read() {
      const size = await conn.read(chunk);
      return { done: size === null, value: chunk.subarray(0, size ?? 0) };
    },
    cancel: () => Promise.resolve(conn.close()),
    releaseLock: () => {},
  };
  const writer = {
    async write(chunk: Uint8Array) {
      for (let at = 0; at < chunk.length;) at += await conn.write(chunk.subarray(at));
    },
    close: () => conn.closeWrite(),
    abort: () => Promise.resolve(conn.close()),
  };
  return { readable: { getReader: () => reader }, writable: { getWriter: () => writer } };
}

/** How many calls are under way. */
let calls = 0;

/** Takes a call, or says that there are too many. A failure is told, and is no other call's. */
async function take(streams: { readable: Source; writable: Sink }, most: number): Promise<void> {
  const room = calls < most;
  if (room) calls++;
  try {
    await answer(streams, room ? menu : busy, { keepAlive: 20_000 });
  } catch (error) {
    console.error(error);
  } finally {
    if (room) calls--; // who was sent away takes nobody's place
  }
}

/** The dialplan goes on, and finds why. */
async function busy(ivr: Ivr): Promise<void> {
  await ivr.set({ EIVR: "busy" });
  await ivr.exit("too many calls");
}

/** A server for Node and Bun. Without a host it takes IPv6 and IPv4. */
async function listen(host: string | undefined, port: number, most: number): Promise<{ port: number; close(): void }> {
  const { createServer } = process.getBuiltinModule("node:net");
  const server = createServer((socket) => {
    socket.setNoDelay(); // the empty line that wakes Asterisk is tiny
    socket.setKeepAlive(true, 30_000);
    take(nodeStreams(socket, socket), most);
  });
  server.listen({ host, port });
  await process.getBuiltinModule("node:events").once(server, "listening");
  server.on("error", (error) => console.error(error.message));
  return { port: (server.address() as AddressInfo).port, close: () => server.close() };
}

function bound(hostname: string | undefined, port: number): Deno.TcpListener {
  try {
    return Deno.listen({ hostname: hostname ?? "::", port });
  } catch (error) {
    if (hostname || error instanceof Deno.errors.AddrInUse) throw error;
    return Deno.listen({ hostname: "0.0.0.0", port }); // where there is no IPv6
  }
}

/** The same on Deno, whose `node:net` accepts nobody any more once file descriptors ran out. */
function listenOnDeno(host: string | undefined, port: number, most: number): { port: number; close(): void } {
  const listener = bound(host, port);
  let closed = false;
  (async () => {
    while (!closed) {
      try {
        const conn = await listener.accept();
        conn.setNoDelay();
        conn.setKeepAlive();
        take(denoStreams(conn), most);
        await new Promise((resolve) => setImmediate(resolve)); // a burst of calls at once would take half as much memory again
      } catch (error) {
        if (closed) return;
        console.error(`Cannot accept a call: ${(error as Error).message}`);
        await new Promise((resolve) => setTimeout(resolve, 100)); // until others have ended
      }
    }
  })();
  const close = () => {
    closed = true;
    listener.close();
  };
  return { port: listener.addr.port, close };
}

function wrong(message: string): never {
  console.error(`menu.ts: ${message}\n${HELP}`);
  return process.exit(2);
}

const HELP = `menu.ts [ARGUMENT]...        the program of ExternalIVR(/path/menu.ts(ARGUMENT,...))
menu.ts --listen [HOST:PORT] [--max-calls N]
                             the server of ExternalIVR(ivr://HOST:PORT(ARGUMENT,...)); more than N calls at once are
                             sent back to the dialplan with EIVR=busy`;

async function serve(args: string[]): Promise<void> {
  const { isIPv6 } = process.getBuiltinModule("node:net");
  const { parseArgs } = process.getBuiltinModule("node:util");
  const { values, positionals } = (() => {
    try {
      return parseArgs({
        args,
        allowPositionals: true,
        options: { listen: { type: "boolean" }, "max-calls": { type: "string", default: "Infinity" } },
      });
    } catch (error) {
      return wrong((error as Error).message);
    }
  })();
  const address = positionals.join(" ");
  const most = Number(values["max-calls"]);
  if (!(most >= 1)) wrong(`--max-calls "${values["max-calls"]}" has to be a number above zero`);
  const bare = /^\d+$/.test(address) ? `:${address}` : isIPv6(address) ? `[${address}]` : address;
  const [, v6, name, port = "2949"] = /^(?:\[(.*)\]|([^:\s]*))(?::(\d+))?$/.exec(bare) ?? [];
  const host = v6 || name || undefined;
  if (v6 === undefined && name === undefined || Number(port) > 65535) {
    wrong(`"${address}" has to be [host:]port or host`);
  }
  process.stderr.on("error", () => {}); // a log that nobody reads any more ends no call
  try {
    const server = await ("Deno" in globalThis ? listenOnDeno : listen)(host, Number(port), most);
    console.error(`Waiting for calls on ${!host || isIPv6(host) ? `[${host ?? "::"}]` : host}:${server.port}`);
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => server.close());
  } catch (error) {
    console.error(`Cannot listen: ${(error as Error).message}`);
    process.exitCode = 1;
  }
}

if (import.meta.main) {
  // As a program everything on the command line is the dialplan's, and `params()` brings it
  const args = process.argv.slice(2);
  if (args[0] === "--help") console.log(HELP);
  else if (args[0] === "--listen") await serve(args);
  else {
    await answer(nodeStreams(process.stdin, process.stdout), menu).catch(console.error);
    process.exit(); // a runtime may wait for the end of stdin otherwise
  }
}
