#!/usr/bin/env -S deno run --quiet --allow-net
// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The IVR that everybody writes: it greets, asks for an account number and for a department, tells the dialplan
 * both, and goes on there. One file for Deno, Bun and Node 24, as a program or as a server:
 *
 * ```
 * exten => 100,1,ExternalIVR(/path/menu.ts(sales))          ; the program, by the first line of this file
 * exten => 101,1,ExternalIVR(/usr/bin/node(/path/menu.ts))  ; the same on Node
 * exten => 102,1,ExternalIVR(ivr://localhost(sales))        ; the server: menu.ts --listen [host:port]
 * ```
 *
 * The first argument is the department for callers who press nothing. The dialplan finds `ACCOUNT` and `DEPARTMENT`.
 *
 * @module
 */

import { type AddressInfo, createServer, isIPv6 } from "node:net";
import process from "node:process";
import { Readable, type Writable } from "node:stream";
import { answer, type Ivr, type Sink, type Source } from "../mod.ts";

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

  await ivr.log(`account ${account || "unknown"}, department ${choice ?? "unknown"}`);
  if (account) await ivr.play("auth-thankyou");
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
 * Node's streams as the web's. `Duplex.toWeb` does the same, but there Deno's ends the whole process when a peer resets its
 * connection. A write comes behind what has arrived: where Asterisk is gone it fails and takes the rest of the input with
 * it, the last words of the call among it.
 */
export function webStreams(input: Readable, output: Writable): { readable: Source; writable: Sink } {
  output.on("error", () => {}); // the write that fails says so
  return {
    readable: Readable.toWeb(input),
    writable: new WritableStream<Uint8Array>({
      write: (chunk) =>
        new Promise((resolve, reject) => {
          setImmediate(() => output.write(chunk, (error) => error ? reject(error) : resolve()));
        }),
      close: () => new Promise((resolve) => output.end(resolve)),
      abort: () => void output.destroy(),
    }),
  };
}

/** Takes any number of calls at once, until a signal comes: then no new ones, and those under way end first. */
function listen(address = ""): void {
  const bare = /^\d+$/.test(address) ? `:${address}` : isIPv6(address) ? `[${address}]` : address;
  const { 1: v6, 2: name, 3: port = "2949" } = /^(?:\[(.*)\]|([^:]*))(?::(\d+))?$/.exec(bare) ?? fail(address);
  if (Number(port) > 65535) fail(address);
  // No delay: the empty line that wakes Asterisk is tiny
  const server = createServer({ noDelay: true }, (socket) => {
    answer(webStreams(socket, socket), menu, { keepAlive: 20_000 }).catch(console.error); // no other call's failure
  });
  server.on("error", (error) => {
    console.error(`Cannot listen: ${error.message}`);
    process.exitCode = 1;
  });
  // Without a host: IPv6 and IPv4
  server.listen({ port: Number(port), host: v6 || name || undefined }, () => {
    const bound = server.address() as AddressInfo;
    console.error(`Waiting for calls on ${isIPv6(bound.address) ? `[${bound.address}]` : bound.address}:${bound.port}`);
  });
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => server.close());
}

function fail(address: string): never {
  console.error(`Cannot listen on "${address}": it has to be [host:]port or host`);
  process.exit(2);
}

if (import.meta.main) {
  // As a program everything on the command line is the dialplan's, and `params()` brings it
  const [option, address, ...rest] = process.argv.slice(2);
  if (option === "--help") {
    console.log("menu.ts [ARGUMENT]...          the program of ExternalIVR(/path/menu.ts(ARGUMENT,...))");
    console.log("menu.ts --listen [HOST:PORT]   the server of ExternalIVR(ivr://HOST:PORT(ARGUMENT,...))");
  } else if (option === "--listen") {
    listen(rest.length ? fail([address, ...rest].join(" ")) : address);
  } else {
    await answer(webStreams(process.stdin, process.stdout), menu).catch(console.error);
    process.exit(); // a runtime may wait for the end of stdin otherwise
  }
}
