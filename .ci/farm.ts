// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Tries `examples/haproxy.cfg` and `examples/nginx.conf`, each in front of three `menu.ts --listen`, with a hundred calls at
 * once. One server is killed and one drained under them: nothing may be lost but the calls of the killed one.
 *
 * ```
 * farm.ts NODE BUN FOLDER   ; the paths of the two other runtimes, and a folder for what the proxies need
 * ```
 *
 * @module
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { Asterisk, type Left } from "../examples/asterisk.ts";

const CALLS = 100;
const LATER = 30;
/** The proxies' hour of silence, in seconds: above the 20 s after which `menu.ts` looks whether its peer is there. */
const HOUR = 30;
/** How long the silent callers listen. */
const SILENT = 40;

/** The callers who listen. The others press something after 10 to 15 s. */
const silent = (number: number): boolean => number < 6;

const [node, bun, folder] = Deno.args as [string, string, string];
const menu = new URL("../examples/menu.ts", import.meta.url).pathname;
const runtimes: Record<string, string[]> = {
  Node: [node, menu],
  Deno: [Deno.execPath(), "run", "--quiet", "--allow-net", menu],
  Bun: [bun, menu],
};

/** A process, and what it has said. */
class Started {
  readonly process: Deno.ChildProcess;
  /** All of it, line by line. */
  said: string[] = [];
  #heard = Promise.withResolvers<void>();

  constructor([command = "", ...args]: string[]) {
    this.process = new Deno.Command(command, {
      args,
      cwd: folder, // where .ci/farm finds what is left
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    for (const stream of [this.process.stdout, this.process.stderr]) this.#read(stream);
  }

  async #read(stream: ReadableStream<Uint8Array<ArrayBuffer>>): Promise<void> {
    let rest = "";
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop()!;
      this.said.push(...lines);
      this.#heard.resolve();
      this.#heard = Promise.withResolvers();
    }
  }

  /** What matches, as soon as so many lines do. */
  async says(pattern: RegExp, count = 1): Promise<RegExpExecArray[]> {
    for (;;) {
      const found = this.said.map((line) => pattern.exec(line)).filter((match) => match !== null);
      if (found.length >= count) return found;
      await this.#heard.promise;
    }
  }
}

class Server extends Started {
  port = 0;

  constructor(readonly runtime: string) {
    super([...runtimes[runtime]!, "--listen", "127.0.0.1:0"]);
  }

  async listens(): Promise<this> {
    const [[, port] = []] = await this.says(/^Waiting for calls on .*:(\d+)$/);
    this.port = Number(port);
    return this;
  }
}

/** What became of a call. */
interface Over {
  /** Its side of the connection to the proxy. */
  port: number;
  left: Left;
  variables: Record<string, string>;
  /** Seconds until the first prompt played. */
  waited: number;
}

/** Places a call: it is answered when the first prompt plays, if at all, and then goes on. */
async function place(
  port: number,
  number: number,
  presses: number,
): Promise<{ answered: Promise<unknown>; over: Promise<Over> }> {
  const answered = Promise.withResolvers<number>();
  const began = performance.now();
  const conn = await Deno.connect({ hostname: "127.0.0.1", port });
  conn.setNoDelay();
  const host = new Asterisk(conn, {
    sounds: (file) => file === "hello-world" ? 100 : 1,
    onNote: ({ kind }) => kind === "plays" && answered.resolve((performance.now() - began) / 1000),
  });
  host.plan([[presses, "press", `${1000 + number}#`], [presses + 2, "press", "2"]]);
  const over = host.left.then(async (left) => {
    answered.resolve(Infinity); // if it was not
    return { port: conn.localAddr.port, left, variables: host.variables, waited: await answered.promise };
  });
  return { answered: answered.promise, over };
}

const went = (number: number): Pick<Over, "left" | "variables"> => ({
  left: "continued",
  variables: { ACCOUNT: `${1000 + number}`, DEPARTMENT: "support" },
});

/** Where nobody listens. */
function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** What the two proxies differ in. */
interface Proxy {
  name: string;
  file: string;
  command(path: string): string[];
  /** Whom its log tells of, when a call is over: the caller's port and the last server that was tried. */
  line: RegExp;
  /** Servers by the names that they have in its log. */
  names(servers: Server[]): string[];
  /** Which runtime's server is killed, drained and left. */
  order: string[];
  /** What becomes of a call when there is no server. */
  alone: Pick<Over, "left" | "variables">;
}

const proxies: Proxy[] = [{
  name: "HAProxy",
  file: "haproxy.cfg",
  command: (path) => ["haproxy", "-f", path],
  line: /^127\.0\.0\.1:(\d+) \[.*\] calls menus\/(\S+) /,
  names: () => ["a", "b", "c"],
  order: ["Node", "Deno", "Bun"],
  alone: { left: "hungup", variables: {} },
}, {
  name: "nginx",
  file: "nginx.conf",
  command: (path) => ["nginx", "-e", "stderr", "-p", folder, "-c", path],
  line: /^127\.0\.0\.1:(\d+) (?:\S+, )*127\.0\.0\.1:(\d+) /,
  names: (servers) => servers.map(({ port }) => `${port}`),
  order: ["Bun", "Node", "Deno"],
  alone: { left: "continued", variables: { EIVR: "unreachable" } },
}];

/** The configuration with our ports, an hour that does not last, the log where we read, and the module where it is. */
function configure(text: string, ports: Record<string, number>): string {
  const module = "/usr/lib/nginx/modules/ngx_stream_module.so";
  const at = [folder + "/root", ""].find((root) => existsSync(root + module));
  return text
    .replace("calls.log", "/dev/stdout")
    .replace(`load_module ${module};`, at === undefined ? "" : `load_module ${at}${module};`)
    .replaceAll(/127\.0\.0\.1:(\d+)/g, (_, port) => `127.0.0.1:${ports[port]}`)
    .replaceAll(/\b1h\b/g, `${HOUR}s`);
}

async function tryOut({ name, file, command, line, names, order, alone }: Proxy): Promise<string> {
  const servers = await Promise.all(order.map((runtime) => new Server(runtime).listens()));
  const [killed, drained, left] = servers as [Server, Server, Server];
  const port = freePort();
  const ports = { 2949: port, 2950: freePort(), 4001: killed.port, 4002: drained.port, 4003: left.port };
  const text = await Deno.readTextFile(new URL(`../examples/${file}`, import.meta.url));
  await Deno.writeTextFile(`${folder}/${file}`, configure(text, ports));
  const proxy = new Started(command(`${folder}/${file}`));
  let ended = false;
  proxy.process.status.then(() => ended = true);
  while (!await connects(port)) {
    assert(!ended, `${name} did not start: ${proxy.said.join("\n")}`);
  }

  const numbers = [...Array(CALLS).keys()];
  const calls = await Promise.all(
    numbers.map((number) => place(port, number, silent(number) ? SILENT : 10 + 5 * number / CALLS)),
  );
  await Promise.all(calls.map(({ answered }) => answered));
  killed.process.kill("SIGKILL");
  await killed.process.status;
  drained.process.kill("SIGTERM");
  while (await connects(drained.port));
  const later = await Promise.all(
    [...Array(LATER).keys()].map((number) => place(port, CALLS + number, 5 + number / LATER)),
  );
  const over = await Promise.all([...calls, ...later].map(({ over }) => over));
  const { code } = await drained.process.status;

  // Which call was whose, as the proxy's log tells
  const lines = await proxy.says(line, over.length);
  const server = new Map(lines.map(([, port, at = ""]) => [Number(port), servers[names(servers).indexOf(at)]]));
  const whose = over.map(({ port }) => server.get(port));
  const shares = servers.map((server) => whose.slice(0, CALLS).filter((its) => its === server).length);
  const lost = over.map((_, number) => number).filter((number) => !same(over[number]!, went(number)));
  const waited = Math.max(...over.slice(CALLS).map(({ waited }) => waited));
  const doomed = numbers.filter((number) => whose[number] === killed);
  assert(`${lost}` === `${doomed}`, `${name}: lost were the calls ${lost}, and killed ${doomed}`);
  assert(Math.max(...shares) - Math.min(...shares) <= 3, `${name}: the servers have ${shares} calls`);
  assert(whose.slice(CALLS).every((its) => its === left), `${name}: not all later calls are with who is left`);
  assert(waited < 5, `${name}: a later call waited for ${waited} s`);
  assert.equal(code, 0, `${name}: what became of the server that was drained`);

  left.process.kill("SIGKILL");
  await left.process.status;
  const { over: last } = await place(port, 0, 1);
  const { left: how, variables } = await last;
  assert.deepEqual({ left: how, variables }, alone, `${name}: a call without a server`);
  // Checks, and those who only look whether somebody listens, are no calls
  for (const { runtime, said } of servers) assert.equal(said.length, 1, `${name}: ${runtime} says ${said.join("\n")}`);
  proxy.process.kill("SIGTERM");
  await proxy.process.status;

  const kept = numbers.filter((number) => silent(number) && whose[number] !== killed).length;
  return `${name}: of ${CALLS} calls (${order.map((runtime, i) => `${runtime} ${shares[i]}`).join(", ")}) ` +
    `${CALLS - lost.length} went their way, ${kept} of them silent for longer than the timeout, ` +
    `and ${lost.length} were lost with ${killed.runtime}; ${drained.runtime} drained; ` +
    `${LATER} later ones on ${left.runtime}, answered within ${Math.ceil(waited * 1000)} ms; without a server: ${how}`;
}

function same(over: Over, expected: Pick<Over, "left" | "variables">): boolean {
  return over.left === expected.left && Object.entries(expected.variables).every(([k, v]) => over.variables[k] === v);
}

async function connects(port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname: "127.0.0.1", port })).close();
    return true;
  } catch {
    return false;
  }
}

const patience = setTimeout(() => {
  console.error("A call did not end, or a log does not tell of it");
  Deno.exit(1);
}, 100_000);
const results = await Promise.allSettled(proxies.map(tryOut));
clearTimeout(patience);
for (const result of results) {
  if (result.status === "fulfilled") console.log(result.value);
  else console.error(result.reason instanceof Error ? result.reason.message : result.reason);
}
Deno.exit(results.every(({ status }) => status === "fulfilled") ? 0 : 1);
