// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The menu at the edge: a `fetch` handler that answers calls over a WebSocket each. `relay.ts`, beside Asterisk, carries
 * them here. One file for Deno, Bun and Workers:
 *
 * ```
 * TOKEN=secret deno serve --allow-env=TOKEN --port 8080 examples/edge.ts
 * TOKEN=secret PORT=8080 bun examples/edge.ts
 * npx wrangler dev examples/edge.ts --port 8080 --var TOKEN:secret
 * ```
 *
 * Without a token everybody may call, but for browsers, which never may.
 *
 * @module
 */

import { answer, type Bytes, type Sink, type Source } from "../mod.ts";
import { menu } from "./menu.ts";

// What not every runtime has, so that the types of each one do
declare const Deno: undefined | {
  upgradeWebSocket(request: Request): { socket: WebSocket; response: Response };
  addSignalListener: unknown;
};
declare const WebSocketPair: undefined | (new () => { 0: WebSocket; 1: WebSocket & { accept(): void } });
const { process } = globalThis as {
  process?: { env: { TOKEN?: string }; exit(): void; once(signal: string, listener: () => void): void };
};

// ---------------------------------------------------------------------------------------------------------
// Calls
// ---------------------------------------------------------------------------------------------------------

let calls = 0;
let draining = false;

/** Takes a call from its first event to its last. Never rejects: one call's failure is no other's. */
async function take(streams: { readable: Source; writable: Sink }): Promise<void> {
  calls++;
  await answer(streams, menu, { keepAlive: 20_000 }).catch(console.error);
  calls--;
  if (draining) drained();
}

function drained(): void {
  // Meanwhile the last call's WebSocket closes, and one that was about to open does
  if (!calls) setTimeout(() => calls || process?.exit(), 100);
}

if ((import.meta as { main?: boolean }).main) {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process?.once(signal, () => {
      draining = true;
      drained();
    });
  }
  // `deno serve` is about to listen to the same signals, and would break off the calls under way
  if (typeof Deno !== "undefined") Deno.addSignalListener = () => {};
}

// ---------------------------------------------------------------------------------------------------------
// WebSockets
// ---------------------------------------------------------------------------------------------------------

/** Bytes that may wait for a relay that does not take them. No call has so much to say. */
const MOST = 2 ** 20;

/** Bytes of a chunk, at most. */
const PIECE = 2 ** 16;

/** A call's streams, and what its WebSocket has to tell them. */
interface Line {
  readable: Source;
  writable: Sink;
  receive(data: string | ArrayBuffer | Uint8Array<ArrayBuffer>): void;
  closed(): void;
}

/** Makes the line of a WebSocket. A message is a chunk, or several. The call or the WebSocket ends first, at any moment. */
function line(socket: Pick<WebSocket, "readyState" | "send" | "close"> & { bufferedAmount?: number }): Line {
  let events: ReadableStreamDefaultController<Uint8Array> | undefined; // none when nobody reads any more
  return {
    readable: new ReadableStream<Uint8Array>({
      start: (controller) => void (events = controller),
      cancel() {
        events = undefined;
        socket.close();
      },
    }),
    writable: new WritableStream<Bytes>({
      write(chunk) {
        if (socket.readyState !== 1) throw new Error("The WebSocket is closed");
        socket.send(chunk);
        if (socket.bufferedAmount! > MOST) throw new Error("The relay does not read");
      },
      close: () => socket.close(),
      abort: () => socket.close(),
    }),
    receive(data) {
      const bytes = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
      // In pieces: a session looks at its bounds between chunks
      for (let at = 0; at < bytes.length; at += PIECE) events?.enqueue(bytes.subarray(at, at + PIECE));
    },
    closed() {
      events?.close();
      events = undefined;
    },
  };
}

/** A WebSocket that is open as a pair of streams. */
export function webSocketStreams(socket: WebSocket): { readable: Source; writable: Sink } {
  socket.binaryType = "arraybuffer";
  const { receive, closed, ...streams } = line(socket);
  socket.addEventListener("message", ({ data }) => receive(data));
  socket.addEventListener("close", closed);
  socket.addEventListener("error", closed);
  return streams;
}

// ---------------------------------------------------------------------------------------------------------
// Requests
// ---------------------------------------------------------------------------------------------------------

/** What Bun hands to `fetch`, and what Workers do. */
interface Host {
  upgrade?(request: Request, options: object): boolean;
  TOKEN?: string;
}
interface Context {
  waitUntil(promise: Promise<unknown>): void;
}

/** Lets the WebSocket begin, in the way of the runtime. Throws when it is none. */
function upgrade(request: Request, host: Host = {}, context?: Context): Response | undefined {
  if (host.upgrade) {
    if (!host.upgrade(request, {})) throw new Error("This is no WebSocket");
    return undefined; // Bun has answered
  }
  if (typeof Deno !== "undefined") {
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.addEventListener("open", () => take(webSocketStreams(socket)));
    return response;
  }
  const { 0: client, 1: socket } = new WebSocketPair!();
  socket.accept();
  context?.waitUntil(take(webSocketStreams(socket))); // else what follows the call is cancelled
  return new Response(null, { status: 101, webSocket: client } as ResponseInit);
}

function refuse(status: number, why: string): Response {
  return new Response(`${why}\n`, { status });
}

/** Whether a request brings the token. Digests are compared, so that the time it takes tells nothing of the token. */
async function admits(token: string, request: Request): Promise<boolean> {
  const [wanted, given] = await Promise.all(
    [`Bearer ${token}`, request.headers.get("authorization") ?? ""].map(async (text) =>
      new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)))
    ),
  );
  return wanted!.reduce((differs, byte, i) => differs | byte ^ given![i]!, 0) === 0;
}

const TOKEN = process?.env.TOKEN;

/** What `deno serve`, Bun and Workers ask of the module that they serve. */
export default {
  /** Takes a call for each request that upgrades to a WebSocket. */
  async fetch(request: Request, host?: Host, context?: Context): Promise<Response | undefined> {
    if (request.headers.get("upgrade")?.toLowerCase() !== "websocket") {
      return refuse(426, "This answers telephone calls over WebSockets: see relay.ts");
    }
    if (request.headers.has("origin")) return refuse(403, "This answers no browsers");
    const token = TOKEN ?? host?.TOKEN;
    if (token && !await admits(token, request)) return refuse(401, "The token is missing or wrong");
    if (draining) return refuse(503, "No new calls are taken");
    try {
      return upgrade(request, host, context);
    } catch (error) {
      return refuse(400, (error as Error).message);
    }
  },

  /** Where Bun tells what happens to WebSockets. */
  websocket: {
    maxPayloadLength: MOST as number,
    backpressureLimit: MOST as number,
    closeOnBackpressureLimit: true,
    open(socket: WebSocket & { data: Line }): void {
      take(socket.data = line(socket));
    },
    message: ({ data }: { data: Line }, message: string | Uint8Array<ArrayBuffer>): void => data.receive(message),
    close: ({ data }: { data: Line }): void => data.closed(),
  },
};
