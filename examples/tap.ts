// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * A live call as a recording: what crosses its wire, both ways with times, as a file that `replay` of
 * `@externalivr/protocol/testing` plays again as a test. A call that is not tapped costs nothing.
 *
 * @example A server that keeps the calls that went wrong
 * ```ts
 * import { answer, type Ivr, type Sink, type Source } from "@externalivr/protocol";
 * import { tap } from "@externalivr/protocol/tap";
 *
 * async function take(streams: { readable: Source; writable: Sink }, menu: (ivr: Ivr) => Promise<void>) {
 *   const tapped = tap(streams);
 *   try {
 *     await answer(tapped, menu);
 *   } catch (error) {
 *     console.error(error, JSON.stringify(tapped.recording()));
 *   }
 * }
 * ```
 *
 * @module
 */

import {
  type Bytes,
  type IvrCommand,
  type IvrEvent,
  parseCommand,
  parseEvent,
  parseVariables,
  type Sink,
  type Source,
} from "../mod.ts";
import type { Recording } from "./asterisk.ts";

/** How a call is tapped. */
export interface TapOptions {
  /**
   * Whether values are kept. Without them every character of a variable's value, of an argument and of a text for the log is
   * an `x`, and every digit that the caller pressed a `0`: lengths, times and `*` and `#` stay, so that the call can be
   * followed, but a menu that is played again may go another way. The default is `true`.
   *
   * @default true
   */
  values?: boolean;
  /**
   * How many characters are kept, a bound on memory: what comes after them is not recorded, and the recording has no end
   * then. The default is 1 MiB.
   *
   * @default 1048576
   */
  most?: number;
  /** The time in milliseconds, from any fixed point. The default is `performance.now`. */
  now?: () => number;
}

/** A pair of streams that is listened to. */
export interface Tapped {
  /** The events, for `answer`. */
  readable: Source;
  /** The commands, for `answer`. */
  writable: Sink;
  /** The call so far. */
  recording(): Recording;
}

/** What passed: bytes as the characters U+0000 to U+00FF, or the end of them. */
type Passed = [at: number, text: string | null];

/**
 * Listens to the streams of a call, and hands them on as they are.
 *
 * What the wire does not tell is derived: the caller's keys and hang-up from their events, the lengths of sounds from when
 * they began and ended (one that never ended counts a second more than it played), variables from the replies to `get`,
 * the application and its arguments from `params`, the option `i` from its event and `n` from `answer`. The log has what the
 * application caused.
 */
export function tap(streams: { readable: Source; writable: Sink }, options: TapOptions = {}): Tapped {
  const { values = true, most = 2 ** 20, now = () => performance.now() } = options;
  const began = now();
  const events: Passed[] = [];
  const commands: Passed[] = [];
  let room = most;
  const note = (where: Passed[], chunk: Uint8Array | null) => {
    room -= chunk ? chunk.length : 0;
    if (room < 0) return;
    const text = chunk && Array.from(chunk, (byte) => String.fromCharCode(byte)).join("");
    where.push([Math.round((now() - began) * 1000) / 1e6, text]);
  };
  return {
    readable: {
      getReader() {
        const reader = streams.readable.getReader();
        return {
          async read() {
            let passed: Uint8Array | null = null; // also where it breaks
            try {
              const result = await reader.read();
              if (!result.done) passed = result.value ?? null;
              return result;
            } finally {
              note(events, passed);
            }
          },
          cancel: (reason) => reader.cancel(reason),
          releaseLock: () => reader.releaseLock(),
        };
      },
    },
    writable: {
      getWriter() {
        const writer = streams.writable.getWriter();
        const end = () => note(commands, null);
        return {
          write: (chunk: Bytes) => (note(commands, chunk), writer.write(chunk)),
          close: () => (end(), writer.close()),
          abort: (reason) => (end(), writer.abort(reason)),
        };
      },
    },
    recording: () => recordingOf(events, commands, values),
  };
}

/** Asterisk begins a prompt with the next frame of audio: seconds. */
const FRAME = 0.02;

/** A prompt as it is followed: when it was asked for. */
interface Prompt {
  file: string;
  at: number;
}

function recordingOf(events: Passed[], commands: Passed[], values: boolean): Recording {
  const received = linesOf(events).map(([at, line]) => [at, values ? line : hideEvent(line)] as const);
  const steps = commands.map(([at, text]) => [at, text && !values ? hideCommands(text) : text] as const);
  const end = events.find(([, text]) => text === null);
  const recording: Recording = {
    application: "ivr://localhost",
    args: [],
    options: "",
    sounds: {},
    variables: {},
    globals: {},
    caller: [],
    steps,
    received,
    ended: end ? [end[0], "end"] : null,
    log: [],
  };
  const { sounds, variables, log } = recording;
  const options = new Set<string>();
  const set: Record<string, string> = {};
  const asked: string[][] = [];
  const least: Record<string, number> = {}; // how long the sounds are at least that never ended
  const missing = new Set<string>();
  let effects: (() => void)[] = []; // of commands that are not known to be carried out
  let playlist: Prompt[] = [];
  let free = 0; // since when nothing else plays
  let left: (IvrCommand & { type: "hangup" | "exit" }) | undefined;

  const sent = (at: number, command: IvrCommand) => {
    if (command.type === "play" || command.type === "queue") playlist.push({ file: command.file, at });
    if (command.type === "answer") options.add("n");
    if (command.type === "set") effects.push(() => Object.assign(set, command.variables));
    if (command.type === "log") effects.push(() => log.push(`Log message from EIVR: ${command.message}`));
    if (command.type === "dtmf") {
      const { digits, interval, duration = 0 } = command;
      effects.push(() => log.push(`Sending DTMF: ${digits} ${interval || 250} ${duration}`));
    }
    if (command.type === "get") asked.push(command.names);
    if (command.type === "hangup" || command.type === "exit") left ??= command;
  };
  const carriedOut = () => {
    for (const effect of effects) effect();
    effects = [];
  };
  /** How long the first of the playlist has played. */
  const played = (at: number) => Math.max(0, Math.round((at - Math.max(free, playlist[0]!.at + FRAME)) * 1000) / 1000);
  const atLeast = (file: string, seconds: number) => least[file] = Math.max(least[file] ?? 0, seconds + 1);
  const came = (at: number, event: IvrEvent) => {
    if (event.type === "dtmf") recording.caller.push([Math.max(0, at - 0.2), "press", event.digit]);
    if (event.type === "finished" || event.type === "interrupted" || event.type === "dropped") {
      const i = playlist.findIndex(({ file }) => file === event.file);
      if (i < 0) return;
      playlist = playlist.slice(i);
      if (event.type === "finished") sounds[event.file!] = played(at);
      else atLeast(event.file!, event.type === "interrupted" ? played(at) : 0);
      if (event.type !== "dropped") free = at;
      playlist.shift();
    }
    if (event.type === "failed" && event.reason !== undefined) {
      const i = playlist.map(({ file }) => file).lastIndexOf(event.reason);
      if (i < 0) return;
      missing.add(playlist.splice(i, 1)[0]!.file);
      effects.push(() => log.push(`Unknown file requested '${event.reason}'`));
    }
    if (event.type === "params") [recording.application = "", ...recording.args] = event.params;
    if (event.type === "variables") {
      carriedOut();
      const i = asked.findIndex(([name]) => event.data.startsWith(`${name}=`));
      const names = i < 0 ? [] : asked.splice(i, 1)[0]!;
      for (const [name, value] of Object.entries(parseVariables(event.data, names))) {
        if (value && !(name in set)) variables[name] ??= value;
      }
    }
    if (event.type === "inform") options.add("i");
    const ours = event.type === left?.type;
    if (ours) {
      carriedOut();
      log.push(`${event.type === "exit" ? "Exiting" : "Hanging up"}: ${left!.message}`);
      if (event.type === "exit" && !options.has("i")) {
        log.push(`CONTINUED ${Object.entries(set).map((pair) => pair.join("=")).join(" ")}`);
      }
    }
    if (event.type === "inform" || event.type === "hangup" && !ours) recording.caller.push([at, "hangup"]);
  };

  const told = received.map(([at, line]) => [at, () => came(at, parseEvent(line))] as const);
  const asks = linesOf(steps).map(([at, line]) => [at, () => sent(at, parseCommand(line))] as const);
  for (const [, run] of [...asks, ...told].sort(([a], [b]) => a - b)) run();
  const over = received.at(-1)?.[0] ?? 0;
  playlist.forEach(({ file }, i) => atLeast(file, i ? 0 : played(over)));
  recording.sounds = { ...Object.fromEntries(Object.entries(least).filter(([file]) => !missing.has(file))), ...sounds };
  recording.options = [...options].join("");
  if (end) log.push("HUNGUP");
  return recording;
}

/** Each line, with the time when its end came. */
function linesOf(
  passed: readonly (readonly [at: number, text: string | null, ...rest: unknown[]])[],
): [number, string][] {
  const found: [number, string][] = [];
  let rest = "";
  for (const [at, text] of passed) {
    const lines = (rest + (text ?? "")).split("\n");
    rest = lines.pop()!;
    for (const line of lines) found.push([at, line.replace(/\r$/, "")]);
  }
  return found;
}

const veil = (text: string): string => text.replace(/[^,\n]/g, "x");

/** Commands without the values in them. */
function hideCommands(text: string): string {
  return text.split("\n").map((line) => {
    const { type } = parseCommand(line);
    if (type === "set") return line.replace(/=[^,]*/g, (value) => `=${veil(value.slice(1))}`);
    if (type === "dtmf") {
      return line.replace(/^D,[^,]*/, (keys) => keys.slice(0, 2) + keys.slice(2).replace(/[\da-d]/gi, "0"));
    }
    if (type === "log" || type === "hangup" || type === "exit") return line.slice(0, 2) + veil(line.slice(2));
    return type === "unknown" ? veil(line) : line;
  }).join("\n");
}

/** An event without the values in it. */
function hideEvent(line: string): string {
  const { type } = parseEvent(line);
  if (type === "dtmf") return line.replace(/^[\dA-D]/, "0");
  if (type === "variables") return line.replace(/=.*/s, (values) => `=${veil(values.slice(1))}`);
  if (type === "params") return line.replace(/^([^,]*,[^,]*,[^,]*)(.*)/s, (_, head, args) => head + veil(args));
  return type === "unknown" ? veil(line) : line;
}
