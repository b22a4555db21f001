#!/usr/bin/env -S deno run --quiet --allow-net --allow-sys --allow-env=TOKEN,NODE_USE_SYSTEM_CA
// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The small TCP server beside Asterisk that carries calls to the edge: `ExternalIVR(ivr://localhost)` comes in here, and each
 * call goes on over a WebSocket of its own, with TLS if the address says so, which `ivr://` does not have. One file for
 * Deno, Bun and Node 24:
 *
 * ```
 * TOKEN=secret relay.ts wss://ivr.example.com/ wss://spare.example.com/
 * ```
 *
 * Each call tries the edges in the order given. Where none answers, the dialplan goes on, with `EIVR` set to
 * `unreachable`. A line on stderr tells when a call begins, fails and ends, and nothing of what was said in it.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import { createHash, getRandomValues, randomBytes } from "node:crypto";
import { once } from "node:events";
import * as http from "node:http";
import * as https from "node:https";
import { type AddressInfo, createServer, isIPv6, type Socket } from "node:net";
import process from "node:process";
import { Duplex } from "node:stream";
import { parseArgs } from "node:util";

const HELP = `relay.ts [OPTION]... EDGE...   carries calls of ExternalIVR(ivr://localhost) to ws:// or wss:// addresses

  --listen [HOST:]PORT   where calls come in; 127.0.0.1:2949 if not given
  --max-calls N          a call beyond so many at once goes on in the dialplan, with EIVR set to busy
  --ping SECONDS         how often an edge is asked whether it is still there; 20 if not given. A call ends when its
                         edge has not answered by the next time

TOKEN in the environment goes to the edges, as "Authorization: Bearer TOKEN"; NODE_EXTRA_CA_CERTS is the file of a
certificate of your own. After SIGTERM no new calls are taken, and those under way end first. A call takes two file
descriptors.`;

/** Milliseconds that an edge may take to answer. */
const PATIENCE = 3_000;
/** Milliseconds that a side may take to close when a call is over. */
const GRACE = 5_000;
/** Bytes that may wait in one direction. No call has so much to say: a side that leaves them waiting is dead. */
const MOST = 2 ** 20;

// ---------------------------------------------------------------------------------------------------------
// A call
// ---------------------------------------------------------------------------------------------------------

interface Options {
  edges: string[];
  headers: Record<string, string>;
  /** In seconds. */
  ping: number;
}

/** Tells what became of a call, at which edge. */
type Report = (edge: string, what: string) => void;

/** Carries one call until one side ends, and then ends the other. Never rejects. */
async function carry(call: Duplex, options: Options, report: Report): Promise<void> {
  const over = new AbortController(); // its reason is why
  const { signal } = over;
  // Read from the start: nothing else tells that the caller has left
  const early: Uint8Array[] = [];
  let waiting = 0;
  let send = (data: Uint8Array): number => (early.push(data), waiting += data.length);
  call.on("data", (data) => {
    if (!signal.aborted && send(data as Uint8Array) > MOST) over.abort("the edge does not read");
  });
  call.on("end", () => over.abort("Asterisk closed"));
  call.on("error", ({ message }) => over.abort(`Asterisk closed, ${message}`));

  for (const address of options.edges) {
    const { origin, pathname } = new URL(address); // what else it has may be secret
    const name = origin + pathname;
    let edge: Socket;
    try {
      edge = await reach(address, options.headers, signal);
    } catch (why) {
      report(name, `${signal.aborted ? "ended" : "failed"}: ${why}`);
      if (signal.aborted) return await close(call);
      continue;
    }
    report(name, "began");
    send = (data) => {
      edge.write(frame(BINARY, data));
      return edge.writableLength;
    };
    early.splice(0).forEach(send);

    const frames = new Frames();
    let heard = true;
    // Behind what Asterisk has said: when it is gone a write fails, and takes with it what was not read yet
    edge.on("data", (data) => {
      edge.pause();
      setImmediate(() => {
        edge.resume();
        if (signal.aborted) return;
        heard = true;
        try {
          const { message, ping, close } = frames.read(data as Buffer);
          if (message.length) call.write(message);
          if (ping) edge.write(frame(PONG, ping));
          if (close) over.abort(`the edge closed${close.length ? `, ${close[0]! << 8 | close[1]!}` : ""}`);
          if (edge.writableLength > MOST) throw new Error("the edge does not read");
          if (call.writableLength > MOST) throw new Error("Asterisk does not read");
        } catch (error) {
          over.abort((error as Error).message);
          edge.destroy();
        }
      });
    });
    edge.on("close", () => setImmediate(() => over.abort("the edge is gone")));
    const timer = setInterval(() => {
      if (!heard) over.abort("the edge is silent");
      heard = false;
      edge.write(frame(PING));
    }, Math.min(options.ping * 1000, 2 ** 31 - 1));

    await aborted(signal);
    clearInterval(timer);
    report(name, `ended: ${signal.reason}`);
    await Promise.all([close(call), close(edge, frame(CLOSE))]);
    return;
  }
  report("-", "ended: no edge answered");
  await decline(call, "unreachable");
}

/**
 * Lets the dialplan go on. Asterisk carries out the first command, and looks at the second only when more comes or when
 * nothing can come any more: it is the end of the stream that brings the `E`.
 */
async function decline(call: Duplex, reason: "busy" | "unreachable"): Promise<void> {
  call.on("error", () => {}).resume();
  await close(call, `V,EIVR=${reason}\nE,${reason}\n`);
}

/** Ends a connection with its last words, and breaks it off if they are not taken. */
async function close(socket: Duplex, words: string | Uint8Array = ""): Promise<void> {
  const closed = new Promise((resolve) => socket.destroyed ? resolve(true) : socket.on("close", resolve));
  const timer = setTimeout(() => socket.destroy(), socket.writableLength > MOST ? 0 : GRACE);
  socket.end(words);
  await closed;
  clearTimeout(timer);
}

// ---------------------------------------------------------------------------------------------------------
// Its WebSocket. The standard one can neither be broken off (20 edges that flood one took 1.4 GB on Deno, and one
// that is dead keeps it for ever) nor ask whether the other side is still there
// ---------------------------------------------------------------------------------------------------------

const BINARY = 2;
const CLOSE = 8;
const PING = 9;
const PONG = 10;

/** Asks an edge for a WebSocket. Rejects with why there is none, which `signal` knows when nobody needs it any more. */
function reach(address: string, headers: Record<string, string>, signal: AbortSignal): Promise<Socket> {
  const key = randomBytes(16).toString("base64");
  const accept = createHash("sha1").update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest("base64");
  const request = (address.startsWith("wss") ? https : http).request(address.replace("ws", "http"), {
    headers: {
      ...headers,
      connection: "Upgrade",
      upgrade: "websocket",
      "sec-websocket-key": key,
      "sec-websocket-version": "13",
    },
  });
  return new Promise((resolve, reject) => {
    const fail = (why: string) => {
      settled();
      reject(why);
      request.destroy();
    };
    const left = () => fail(signal.reason);
    const timer = setTimeout(fail, PATIENCE, `no answer in ${PATIENCE / 1000} s`);
    const settled = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", left);
    };
    signal.addEventListener("abort", left);
    request.on("error", ({ message }) => fail(message));
    request.on("response", ({ statusCode }) => fail(`the answer was ${statusCode}`));
    request.on("upgrade", (response, stream, head) => {
      const socket = stream as Socket;
      socket.setNoDelay(); // the empty line that wakes Asterisk is tiny
      socket.on("error", () => {}); // it closes then as well
      if (response.headers["sec-websocket-accept"] !== accept) return fail("no WebSocket");
      settled();
      socket.unshift(head);
      resolve(socket);
    });
    request.end();
  });
}

/** A message or a control frame, masked as a client's have to be. */
function frame(opcode: number, payload: Uint8Array = new Uint8Array()): Uint8Array {
  const { length } = payload;
  const at = length < 126 ? 2 : length < 2 ** 16 ? 4 : 10;
  const bytes = new Uint8Array(at + 4 + length);
  const view = new DataView(bytes.buffer);
  view.setUint8(0, 0x80 | opcode);
  view.setUint8(1, 0x80 | (at === 2 ? length : at === 4 ? 126 : 127));
  if (at === 4) view.setUint16(2, length);
  if (at === 10) view.setBigUint64(2, BigInt(length));
  const mask = getRandomValues(bytes.subarray(at, at + 4));
  for (let i = 0; i < length; i++) bytes[at + 4 + i] = payload[i]! ^ mask[i % 4]!;
  return bytes;
}

/** Takes apart what an edge sends, however it is cut. */
class Frames {
  /** The beginning of a frame, too short to tell what it is. */
  #rest: Uint8Array = new Uint8Array();
  /** How many bytes of the message's frame are still to come. */
  #left = 0;

  /**
   * What came of messages, text or binary, and of the last ping and close, which are all that needs an answer. It makes no
   * object for a frame: an edge may flood with some that have one byte, or none.
   */
  read(data: Buffer): { message: Uint8Array; ping: Uint8Array | undefined; close: Uint8Array | undefined } {
    const bytes = this.#rest.length ? Buffer.concat([this.#rest, data]) : data;
    const message = new Uint8Array(bytes);
    let [at, end] = [0, 0]; // of what was read, and of the message
    const last: number[] = []; // where the last control frame of each kind is
    for (;;) {
      const piece = Math.min(this.#left, bytes.length - at);
      if (piece) message.copyWithin(end, at, at + piece);
      this.#left -= piece;
      at += piece;
      end += piece;

      if (bytes.length < at + 2) break;
      const opcode = bytes[at]! & 0x7f; // the bit above tells where a message ends, which is nothing to us
      const size = bytes[at + 1]!;
      const from = at + (size < 126 ? 2 : size === 126 ? 4 : 10);
      if (bytes.length < from) break;
      if (opcode <= BINARY && size < 128) {
        this.#left = size < 126
          ? size
          : size === 126
          ? bytes.readUInt16BE(at + 2)
          : Number(bytes.readBigUInt64BE(at + 2));
        at = from;
      } else if (opcode >= CLOSE && opcode <= PONG && size < 126) {
        if (bytes.length < from + size) break;
        last[opcode] = at;
        at = from + size;
      } else throw new Error("the edge speaks no WebSocket");
    }
    this.#rest = new Uint8Array(bytes.subarray(at)); // a view would keep all of it
    const payload = (at?: number) => at === undefined ? at : bytes.subarray(at + 2, at + 2 + bytes[at + 1]!);
    return { message: message.slice(0, end), ping: payload(last[PING]), close: payload(last[CLOSE]) };
  }
}

function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => signal.aborted ? resolve() : signal.addEventListener("abort", () => resolve()));
}

// ---------------------------------------------------------------------------------------------------------
// Where calls come in
// ---------------------------------------------------------------------------------------------------------

type Take = (call: Duplex, peer: string) => void;
interface Listening {
  at: string;
  close(): void;
}

// What not every runtime has, so that the types of each one do
interface Conn {
  readable: ReadableStream<Uint8Array>;
  writable: WritableStream<Uint8Array>;
  remoteAddr: { hostname: string; port: number };
  setNoDelay(): void;
}
declare const Deno: undefined | {
  listen(options: { hostname: string; port: number }): {
    addr: { hostname: string; port: number };
    accept(): Promise<Conn>;
    close(): void;
  };
};

/** A server for Node and Bun. */
async function listen(host: string, port: number, take: Take): Promise<Listening> {
  const server = createServer({ noDelay: true }, (call) => take(call, place(call.remoteAddress, call.remotePort)));
  server.listen({ host, port });
  await once(server, "listening");
  server.on("error", ({ message }) => console.error(`Cannot accept a call: ${message}`));
  const bound = server.address() as AddressInfo;
  return { at: place(bound.address, bound.port), close: () => server.close() };
}

/** The same on Deno, whose `node:net` accepts nobody any more once file descriptors ran out. */
function listenOnDeno(hostname: string, port: number, take: Take): Listening {
  const listener = Deno!.listen({ hostname, port });
  let closed = false;
  (async () => {
    while (!closed) {
      try {
        const conn = await listener.accept();
        conn.setNoDelay();
        take(Duplex.fromWeb(conn), place(conn.remoteAddr.hostname, conn.remoteAddr.port));
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
  return { at: place(listener.addr.hostname, listener.addr.port), close };
}

function place(address = "?", port = 0): string {
  return `${isIPv6(address) ? `[${address}]` : address}:${port}`;
}

// ---------------------------------------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------------------------------------

/** Wrong use, said in one line. */
function wrong(message: string): never {
  console.error(`relay.ts: ${message.replaceAll("\n", " ")}`);
  process.exit(2);
}

function parsed() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        listen: { type: "string", default: "2949" },
        "max-calls": { type: "string", default: "Infinity" },
        ping: { type: "string", default: "20" },
        help: { type: "boolean" },
      },
    });
  } catch (error) {
    return wrong((error as Error).message);
  }
}

async function main(): Promise<void> {
  const { values, positionals } = parsed();
  if (values.help) return console.log(HELP);
  if (!positionals.length) wrong("there is no edge to carry calls to; see relay.ts --help");
  const edges = positionals.map((edge) => {
    const url = URL.parse(edge);
    return url && /^wss?:$/.test(url.protocol) ? url.href : wrong(`"${edge}": it has to be ws://HOST/ or wss://HOST/`);
  });
  const { 1: v6, 2: host = "127.0.0.1", 3: port } = /^(?:(?:\[(.+)\]|([^:]+)):)?(\d+)$/.exec(values.listen) ?? [];
  if (!port || Number(port) > 65535) wrong(`--listen "${values.listen}": it has to be [HOST:]PORT`);
  const [maxCalls, ping] = (["max-calls", "ping"] as const).map((option) => {
    const value = Number(values[option]);
    return value > 0 ? value : wrong(`--${option} "${values[option]}": it has to be a number above zero`);
  }) as [number, number];
  const { TOKEN = "" } = process.env;
  if (/[^!-~]/.test(TOKEN)) wrong("TOKEN: it has to be of visible ASCII characters");
  const headers: Record<string, string> = TOKEN ? { authorization: `Bearer ${TOKEN}` } : {};

  process.stderr.on("error", () => {}); // a log that nobody reads any more ends no call
  let calls = 0;
  let underWay = 0;
  const take = async (call: Duplex, peer: string) => {
    const began = performance.now();
    const who = `${++calls} ${peer}`;
    const report = (edge: string, what: string) =>
      console.error(`${who} ${edge} ${what}, ${((performance.now() - began) / 1000).toFixed(1)} s`);
    if (underWay < maxCalls) {
      underWay++;
      await carry(call, { edges, headers, ping }, report);
      underWay--;
    } else {
      report("-", `ended: ${maxCalls} calls are under way`);
      await decline(call, "busy");
    }
  };
  try {
    const server = await (typeof Deno === "undefined" ? listen : listenOnDeno)(v6 ?? host, Number(port), take);
    console.error(`Waiting for calls on ${server.at}`);
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => server.close());
  } catch (error) {
    wrong(`--listen "${values.listen}": ${(error as Error).message}`);
  }
}

if (import.meta.main) await main();
