#!/usr/bin/env -S deno run --quiet --allow-net
// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The small TCP server beside Asterisk that carries calls to the edge: `ExternalIVR(ivr://localhost)` comes in here, and each
 * call goes on over a WebSocket of its own, with TLS if the address says so, which `ivr://` does not have.
 *
 * ```
 * relay.ts [--listen [HOST:]PORT] wss://ivr.example.com/
 * ```
 *
 * @module
 */

import { type AddressInfo, createServer, type Socket } from "node:net";
import process from "node:process";
import { parseArgs } from "node:util";

/** Carries bytes both ways until one side ends, and then ends the other. */
export function carry(call: Socket, address: string): void {
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  call.pause();
  socket.addEventListener("open", () => call.resume());
  socket.addEventListener("message", ({ data }) => void call.write(new Uint8Array(data)));
  socket.addEventListener("close", () => call.end());
  socket.addEventListener("error", () => call.destroy());
  call.on("data", (data) => socket.send(Uint8Array.from(data)));
  call.on("end", () => socket.close());
  call.on("error", () => socket.close());
}

function wrong(message: string): never {
  console.error(`relay.ts: ${message}\nrelay.ts [--listen [HOST:]PORT] ws://HOST/ or wss://HOST/`);
  process.exit(2);
}

if (import.meta.main) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { listen: { type: "string", default: "2949" } },
  });
  const [address = wrong("there is nowhere to carry calls to")] = positionals;
  if (!/^wss?:/.test(address)) wrong(`"${address}" is no WebSocket's address`);
  const [, host, port] = /^(?:(.+):)?(\d+)$/.exec(values.listen) ?? wrong(`"${values.listen}" is no port`);
  const server = createServer({ noDelay: true }, (call) => carry(call, address));
  server.listen({ port: Number(port), host: host?.replace(/^\[|\]$/g, "") }, () => {
    console.error(`Waiting for calls on port ${(server.address() as AddressInfo).port}`);
  });
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => server.close());
}
