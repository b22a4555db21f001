// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * The menu at the edge: a `fetch` handler that answers calls over a WebSocket each. `relay.ts`, beside Asterisk, carries
 * them here. On Deno `deno serve --port 8080 examples/edge.ts`; as a Worker, with `nodejs_compat`.
 *
 * @module
 */

import { answer, type Sink, type Source } from "../mod.ts";
import { menu } from "./menu.ts";

/** What Workers have for upgrades. */
declare const WebSocketPair: undefined | (new () => { 0: WebSocket; 1: WebSocket & { accept(): void } });

/** A WebSocket as a pair of streams: a message is a chunk. */
export function webSocketStreams(socket: WebSocket): { readable: Source; writable: Sink } {
  socket.binaryType = "arraybuffer";
  return {
    readable: new ReadableStream<Uint8Array>({
      start(controller) {
        let over = false;
        const once = (end: () => void) => () => void (over || (over = true, end()));
        socket.addEventListener("message", ({ data }) => {
          if (over) return;
          controller.enqueue(typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data));
        });
        socket.addEventListener("close", once(() => controller.close()));
        socket.addEventListener("error", once(() => controller.error(new Error("The WebSocket failed"))));
      },
      cancel: () => socket.close(),
    }),
    writable: new WritableStream<Uint8Array<ArrayBuffer>>({
      start: () =>
        new Promise<void>((resolve) => {
          if (socket.readyState === 1) return resolve();
          for (const event of ["open", "close", "error"]) socket.addEventListener(event, () => resolve());
        }),
      write(chunk) {
        if (socket.readyState !== 1) throw new Error("The WebSocket is closed");
        socket.send(chunk);
      },
      close: () => socket.close(),
      abort: () => socket.close(),
    }),
  };
}

/** Deno's way to a WebSocket, or the Workers'. */
function upgrade(request: Request): { socket: WebSocket; response: Response } {
  if (typeof WebSocketPair === "undefined") return Deno.upgradeWebSocket(request);
  const { 0: client, 1: socket } = new WebSocketPair();
  socket.accept();
  return { socket, response: new Response(null, { status: 101, webSocket: client } as ResponseInit) };
}

export default {
  /** Takes a call for each request that upgrades to a WebSocket. */
  fetch(request: Request): Response {
    if (request.headers.get("upgrade")?.toLowerCase() !== "websocket") {
      return new Response("This answers telephone calls over WebSockets: see relay.ts\n", { status: 426 });
    }
    const { socket, response } = upgrade(request);
    answer(webSocketStreams(socket), menu, { keepAlive: 20_000 }).catch(console.error);
    return response;
  },
};
