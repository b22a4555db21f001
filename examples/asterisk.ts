// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Asterisk's side of the wire, over any pair of streams: to try an IVR without a telephone, or to build what calls one.
 *
 * To test an IVR see `@externalivr/protocol/testing`, which places calls with this in a time of their own.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { Ivr } from "@externalivr/protocol";
 * import { Asterisk } from "@externalivr/protocol/asterisk";
 *
 * const events = new TransformStream<Uint8Array, Uint8Array>();
 * const commands = new TransformStream<Uint8Array, Uint8Array>();
 * const host = new Asterisk({ readable: commands.readable, writable: events.writable });
 * const ivr = new Ivr({ readable: events.readable, writable: commands.writable });
 * await ivr.exit();
 * assert.deepEqual(await host.left, "continued");
 * ```
 *
 * @module
 */

import { Buffer } from "node:buffer";
import type { Digit, Sink, Source } from "../mod.ts";

// ---------------------------------------------------------------------------------------------------------
// Clocks
// ---------------------------------------------------------------------------------------------------------

/** Where a call's time comes from: whole microseconds throughout, so that what is due together is together. */
export interface Clock {
  /** The time, from any fixed point. */
  now(): number;
  /** Runs something after so many microseconds. */
  after(time: number, run: () => void): unknown;
  /** Does not run it after all. */
  cancel(timer: unknown): void;
}

/** The time of the wall, for calls over real streams. */
export const realClock: Clock = {
  now: () => Math.round(performance.now() * 1000),
  after: (time, run) => setTimeout(run, time / 1000),
  cancel: (timer) => clearTimeout(timer as number),
};

/** Seconds, as they are told, in microseconds. */
const micros = (seconds: number): number => Math.round(seconds * 1e6);

// ---------------------------------------------------------------------------------------------------------
// The host
// ---------------------------------------------------------------------------------------------------------

/** The dialplan's call of `ExternalIVR`. */
export interface Dialplan {
  /** The program's path or `ivr://host[:port]`. */
  application: string;
  /** Its arguments. */
  args: string[];
  /** The letters behind the comma: `n`, `i`, `d`. */
  options: string;
}

/** Something that happened in a call, for transcripts and screens. */
export interface Note {
  /** Seconds since the call began. */
  at: number;
  /**
   * `event` and `command` are lines of the wire, `log` is Asterisk's log; the others tell of the call: what plays now,
   * what the caller does, what is pressed toward the caller.
   */
  kind:
    | "event"
    | "command"
    | "log"
    | "plays"
    | "answers"
    | "caller"
    | "sends"
    | "ends";
  /** What it was. */
  text: string;
}

/** What the host is like. Its texts are UTF-8 on the wire; {@linkcode fromBytes} makes one of any bytes. */
export interface HostOptions extends Partial<Dialplan> {
  /** The playable files and their lengths in seconds. Without it every name plays a second. */
  sounds?: Record<string, number> | ((file: string) => number | undefined);
  /**
   * Files that exist and cannot be opened: they are skipped without an event. With `silence/10` among them it is an Asterisk
   * without the core sounds, where nothing plays.
   */
  unreadable?: string[];
  /** The channel's variables. */
  variables?: Record<string, string>;
  /** The global variables. */
  globals?: Record<string, string>;
  /** Whether the channel can be answered, for the option `n`. The default is `true`. */
  answerable?: boolean;
  /**
   * Asterisk's version: before 15 a burst does not stall, before 11 there is no `I`, before 1.8 no `D` and no data on `T`
   * and `Z`. The default is 22.
   */
  version?: number;
  /** The Unix time, in seconds, when the call begins. The default is now. */
  epoch?: number;
  /** The default is {@linkcode realClock}. */
  clock?: Clock;
  /** Called with everything that happens. */
  onNote?: (note: Note) => void;
}

/** How a call left `ExternalIVR`: `continued` in the dialplan, or `hungup`. */
export type Left = "continued" | "hungup";

/** What a caller does, when: seconds since the call began. */
export type CallerAction = readonly [at: number, does: "press", keys: string] | readonly [at: number, does: "hangup"];

/** A call as it is recorded: times in seconds from the connection, bytes as the characters U+0000 to U+00FF. */
export interface Recording extends Dialplan {
  /** The playable files and their lengths in seconds. */
  sounds: Record<string, number>;
  /** The channel's variables before the call. */
  variables: Record<string, string>;
  /** The global variables before the call. */
  globals: Record<string, string>;
  /** `[at, "press", keys]`, each key held 100 ms, 150 ms between keys; `[at, "hangup"]`. */
  caller: CallerAction[];
  /** `[at, text]` sent in one write; `null` ends the commands. With `"stderr"` that is where a program wrote it. */
  steps: (readonly [at: number, text: string | null, to?: "stderr"])[];
  /** `[at, line]` each line that came back. */
  received: (readonly [at: number, line: string])[];
  /** When and how the events ended. */
  ended: readonly [at: number, how: string] | null;
  /** What Asterisk logged, and `CONTINUED` or `HUNGUP`. */
  log: string[];
  /** As in {@linkcode HostOptions}, where it was not the default. */
  version?: number;
  /** As in {@linkcode HostOptions}, where it was not the default. */
  answerable?: boolean;
  /** As in {@linkcode HostOptions}, where it was not the default. */
  unreadable?: string[];
}

/** What is playing. */
export interface Playing {
  /** The file. */
  file: string;
  /** When it began: seconds since the call began. */
  since: number;
  /** How long it is, in seconds. */
  length: number;
}

/** From the press of a key to its event, and to the next key: microseconds. */
const KEY = 200_000;
const NEXT_KEY = 250_000;
/** The same of keys that were pressed while Asterisk did not listen. */
const LATE_KEY = 110_000;
const NEXT_LATE_KEY = 180_000;
/** Asterisk looks at the playlist with every frame of audio: microseconds. */
const FRAME = 20_000;
/** How long Asterisk takes to look at what arrived, in microseconds: what comes within it arrives together. */
const REACTION = 200;
/** What plays while nothing else does: where it cannot be opened, nothing plays any more. */
const SILENCE = "silence/10";

/**
 * One call in Asterisk's `ExternalIVR`, as strict as the real one: short commands are ignored, long ones cut, a burst
 * stalls, on stderr too, and a `D` or half a line blocks everything else.
 *
 * It reads and writes the wire by itself, without the codec of an IVR, so that each is a test of the other.
 */
export class Asterisk {
  /** The channel's variables, and functions like `CALLERID(name)`, as they are now. */
  readonly variables: Record<string, string>;
  /** The global variables. */
  readonly globals: Record<string, string>;
  /** Asterisk's log. */
  readonly log: string[] = [];
  /** The files that were asked for and exist, and their lengths in seconds. */
  readonly found: Map<string, number> = new Map();
  /** Settles when the call has left `ExternalIVR`. */
  readonly left: Promise<Left>;

  #options: HostOptions;
  #clock: Clock;
  #began: number;
  #epoch: number;
  #version: number;
  #writer: ReturnType<Sink["getWriter"]>;
  #readers: ReturnType<Source["getReader"]>[] = [];
  #leave!: (left: Left) => void;
  #end: { at: number; left: Left } | undefined;

  // What is recorded
  #caller: CallerAction[] = [];
  #steps: [at: number, text: string | null, to?: "stderr"][] = [];
  #received: [at: number, line: string][] = [];

  // The channel
  #up: boolean;
  #gone: boolean; // the caller
  #hungUp: boolean; // and nothing that waits has found that out
  #told: boolean; // that the caller is gone
  #keys: Digit[] = []; // that wait until Asterisk listens
  #listening: unknown; // the timer of the next of them
  #planned: unknown[] = []; // what the caller will do

  // The playlist
  #autoclear = false;
  #plays = false; // files, or silence
  #playlist: string[] = []; // begins with what plays
  #playing: Playing | undefined;
  #aborted = false; // what plays was stopped, and the next frame will find that out
  #mute = false; // no frame was to be had, after which Asterisk asks for none
  #audio?: Playback;
  #finished: string[] = []; // not told yet

  // The loop
  #commands: Descriptor;
  #errors: Descriptor | undefined;
  #reacting: unknown;
  #blocked: Descriptor | undefined; // whose line is read, and half of it is missing
  #sending: { timer: unknown; hungUp: () => void } | undefined; // a `D` that goes on

  /**
   * Begins a call over the IVR's streams: `readable` brings its commands, `writable` takes the events, `stderr` is what a
   * program has beside them.
   */
  constructor(
    streams: { readable: Source; writable: Sink; stderr?: Source },
    options: HostOptions = {},
  ) {
    this.#options = options;
    this.#clock = options.clock ?? realClock;
    this.#version = options.version ?? 22;
    this.#began = this.#clock.now();
    this.#epoch = options.epoch ?? Date.now() / 1000;
    this.variables = { ...options.variables };
    this.globals = { ...options.globals };
    this.left = new Promise((resolve) => this.#leave = resolve);
    const dead = this.#has("d"); // which was answered before
    this.#up = this.#gone = dead;
    this.#hungUp = this.#told = dead;
    this.#writer = streams.writable.getWriter();
    if (!this.#has("n")) this.#answer();
    this.#commands = this.#read(streams.readable);
    if (streams.stderr) this.#errors = this.#read(streams.stderr, "stderr");
  }

  /** Seconds since the call began. */
  get at(): number {
    return this.#elapsed / 1e6;
  }

  /** Whether the channel is answered. */
  get up(): boolean {
    return this.#up;
  }

  /** Whether the call has left `ExternalIVR`. */
  get over(): boolean {
    return this.#end !== undefined;
  }

  /** What plays now; `undefined` is silence. */
  get playing(): Playing | undefined {
    return this.#gone || this.over || this.#mute ? undefined : this.#playing;
  }

  /** What waits in the playlist, in order. */
  get waiting(): string[] {
    return this.#playlist.slice(this.playing && !this.#aborted ? 1 : 0);
  }

  /**
   * The caller releases a key. One that is released while a `D` goes on is lost, as Asterisk loses it; while Asterisk waits
   * for the rest of a line, or the channel is not answered, it waits.
   *
   * @throws {TypeError} for a key that does not exist.
   */
  press(key: Digit): void {
    checkKey(key);
    if (this.over || this.#gone) return;
    this.#caller.push([(this.#elapsed - KEY) / 1e6, "press", key]);
    this.#press(key);
  }

  #press(key: Digit): void {
    if (this.over || this.#gone) return;
    this.#note("caller", `presses ${key}`);
    this.#keys.push(key);
    if (this.#listens && this.#keys.length === 1) this.#hear();
  }

  /** The caller hangs up. */
  hangUp(): void {
    if (this.over || this.#gone) return;
    this.#caller.push([this.at, "hangup"]);
    this.#hangUp();
  }

  #hangUp(): void {
    if (this.over || this.#gone) return;
    this.#note("caller", "hangs up");
    this.#gone = true;
    this.#keys = [];
    this.#audio?.stop();
    if (this.#sending) {
      this.#clock.cancel(this.#sending.timer);
      return this.#sending.hungUp();
    }
    this.#hungUp = true;
    this.#loop();
  }

  /**
   * Has the caller do things by themselves: `[at, "press", keys]` and `[at, "hangup"]`, in seconds since the call began.
   * A key is held for 100 ms, and Asterisk tells of it 100 ms after that; the next follows 150 ms after the release.
   * Returns when the last of them is done.
   *
   * @throws {TypeError} for a key that does not exist.
   */
  plan(caller: CallerAction[]): number {
    let last = 0;
    const act = (at: number, run: () => void) => {
      last = Math.max(last, at);
      if (at <= this.#elapsed) run();
      else this.#planned.push(this.#clock.after(at - this.#elapsed, run));
    };
    for (const action of caller) {
      const [at, does, keys = ""] = action;
      if (does === "hangup") act(micros(at), () => this.#hangUp());
      else if (does !== "press") throw new TypeError(`Cannot plan "${does}": a caller can press and hangup`);
      for (const [i, key] of [...keys.toUpperCase()].entries()) {
        checkKey(key);
        act(micros(at) + KEY + i * NEXT_KEY, () => this.#press(key as Digit));
      }
      this.#caller.push(action);
    }
    return last / 1e6;
  }

  /** The call so far. What the caller is only going to do is in it, and what did not reach the IVR is not. */
  recording(): Recording {
    const { application = "ivr://localhost", args = [], options = "", variables = {}, globals = {}, sounds } =
      this.#options;
    const { version, answerable, unreadable } = this.#options;
    const set = Object.entries(this.variables).filter(([name, value]) => variables[name] !== value);
    const texts = {
      application,
      args,
      options,
      sounds: { ...typeof sounds === "object" && sounds, ...Object.fromEntries(this.found) },
      variables,
      globals,
      ...unreadable && { unreadable },
      log: [
        ...this.log,
        ...this.#end?.left === "continued" ? [`CONTINUED ${set.map((pair) => pair.join("=")).join(" ")}`] : [],
        ...this.#end ? ["HUNGUP"] : [],
      ],
    };
    const { log, ...before } = inLatin1(texts);
    return {
      ...before,
      ...version !== undefined && { version },
      ...answerable !== undefined && { answerable },
      caller: [...this.#caller],
      steps: [...this.#steps],
      received: [...this.#received],
      ended: this.#end ? [this.#end.at, "end"] : null,
      log,
    };
  }

  get #elapsed(): number {
    return this.#clock.now() - this.#began;
  }

  #has(option: string): boolean {
    return (this.#options.options ?? "").includes(option);
  }

  #note(kind: Note["kind"], text: string): void {
    this.#options.onNote?.({ at: this.at, kind, text });
  }

  #logs(text: string): void {
    this.log.push(text);
    this.#note("log", text);
  }

  #emit(tag: string, data?: string): void {
    const timestamp = Math.floor(this.#epoch + this.at) | 0; // 32 bits, as Asterisk counts
    const line = `${tag},${String(timestamp).padStart(10)}${data === undefined ? "" : `,${data}`}`;
    this.#note("event", line);
    const bytes = toBytes(`${line}\n`);
    const received: [number, string] = [this.at, latin1(bytes).slice(0, -1)];
    this.#received.push(received);
    this.#writer.write(bytes).catch(() => this.#received.splice(this.#received.lastIndexOf(received), 1));
  }

  #finish(left: Left): void {
    this.#end = { at: this.at, left };
    this.#audio?.stop();
    for (const timer of [this.#reacting, this.#sending?.timer, this.#listening, ...this.#planned]) {
      this.#clock.cancel(timer);
    }
    this.#note("ends", left);
    this.#writer.close().catch(() => {}).then(() => this.#readers.map((reader) => reader.cancel().catch(() => {})));
    this.#leave(left);
  }

  // The caller's keys --------------------------------------------------------------------------------------

  get #listens(): boolean {
    return !!this.#sending || this.#up && !this.#blocked;
  }

  /** Takes a key, which gets lost while others are sent. */
  #hear(): void {
    const key = this.#keys.shift()!;
    if (this.#sending) return;
    this.#emit(key);
    if (this.#autoclear) this.#clear();
  }

  /** Takes the keys that have waited, if Asterisk listens again. */
  #listen(time: number = LATE_KEY): void {
    if (this.over || this.#listening !== undefined || !this.#keys.length) return;
    this.#listening = this.#clock.after(time, () => {
      this.#listening = undefined;
      if (!this.#listens) return;
      if (this.#keys.length) this.#hear();
      this.#listen(NEXT_LATE_KEY);
    });
  }

  // The playlist -------------------------------------------------------------------------------------------

  /** Answers, and begins to play, unless that was done before. */
  #answer(): void {
    if (!this.#up) this.#note("answers", "");
    this.#up = true;
    if (this.#plays) return;
    this.#plays = true;
    this.#hungUp = this.#gone; // which what plays finds out
    this.#look();
    this.#listen();
  }

  #lengthOf(file: string): number | undefined {
    const { sounds, unreadable } = this.#options;
    const own = typeof sounds === "function"
      ? sounds(file)
      : Object.entries(sounds ?? { [file]: 1 }).find(([name]) => name === file)?.[1];
    const length = own ?? (unreadable?.includes(file) ? 0 : undefined);
    if (length !== undefined) this.found.set(file, length);
    return length;
  }

  /** What `I`, `S` and, with autoclear, a key do. */
  #clear(): void {
    const playing = this.#playing && !this.#aborted ? this.#playlist.shift() : undefined;
    if (playing !== undefined) this.#emit("T", this.#version < 1.8 ? undefined : playing);
    for (const file of this.#playlist.splice(0)) this.#emit("D", file);
    if (this.#playing && !this.#aborted) {
      this.#aborted = true;
      this.#audio?.stop();
      this.#look();
    }
  }

  /** Has the next frame look at the playlist, unless something plays or nothing could come of it. */
  #look(): void {
    const silence = !this.#aborted && !this.#playlist.length && !this.#options.unreadable?.includes(SILENCE);
    if (silence || this.#mute || this.#gone || this.#audio?.goesOn) return;
    this.#audio = new Playback(this.#clock, FRAME, () => this.#next());
  }

  /** What Asterisk does for a frame, when what played has ended or was stopped, or something was queued in silence. */
  #next(): void {
    let frame = (this.#aborted || !this.#playing && this.#playlist.length > 0) && this.#open();
    if (!frame) {
      // It has ended, which is also how a file of no length begins
      if (this.#playing) this.#finished.push(this.#playlist.shift()!);
      frame = this.#open();
      this.#mute = !frame; // it does not try a second time
    }
    if (frame && this.#playing) {
      this.#audio = new Playback(this.#clock, micros(this.#playing.length), () => this.#next());
    }
    this.#loop();
  }

  /** Opens the next file, or silence. Whether there is a frame in it. */
  #open(): boolean {
    this.#aborted = false;
    this.#playing = undefined;
    for (const file of [...this.#playlist, SILENCE]) {
      if (this.#options.unreadable?.includes(file)) {
        this.#logs(`File '${file}' could not be opened`);
        this.#playlist.shift();
        continue;
      }
      if (!this.#playlist.length) return true;
      const length = this.found.get(file)!; // known since it was queued
      this.#playing = { file, since: this.at, length };
      this.#note("plays", file);
      return length > 0;
    }
    return false;
  }

  // The loop -----------------------------------------------------------------------------------------------

  #read(source: Source, to?: "stderr"): Descriptor {
    const step = (text: string | null) => this.#steps.push(to ? [this.at, text, to] : [this.at, text]);
    const descriptor = new Descriptor(this.#version);
    const reader = source.getReader();
    this.#readers.push(reader);
    (async () => {
      try {
        for (let chunk; !(chunk = await reader.read()).done;) {
          const text = latin1(chunk.value);
          step(text);
          descriptor.arrived += text;
          this.#react();
        }
      } catch { /* a reset is an end */ }
      if (!this.over) step(null);
      descriptor.ended = true;
      this.#react();
    })();
    return descriptor;
  }

  #react(): void {
    if (this.over) return;
    this.#reacting ??= this.#clock.after(REACTION, () => {
      this.#reacting = undefined;
      this.#loop();
    });
  }

  /**
   * Does what Asterisk's thread does turn after turn, until it has to wait: tells that the caller is gone, tells what has
   * finished, and carries out one line. A `D` and half a line stop all that.
   */
  #loop(): void {
    while (!this.over && !this.#sending) {
      if (!this.#blocked) {
        if (this.#gone && !this.#told) {
          this.#told = true;
          if (!this.#has("i")) {
            this.#emit("H");
            return this.#finish("hungup");
          }
          this.#emit("I", "HANGUP");
        }
        for (const file of this.#finished.splice(0)) this.#emit("F", file);
      }
      const from = this.#blocked ?? [this.#errors, this.#commands].find((descriptor) => descriptor?.ready);
      if (!from) return;
      const line = from.gets();
      if (line === undefined) {
        this.#blocked = from;
        return this.#audio?.pause();
      }
      if (this.#blocked) {
        this.#blocked = undefined;
        if (!this.#gone) this.#audio?.resume();
      }
      if (!line) {
        this.#logs("Child process went away");
        return this.#finish("hungup");
      }
      const text = line.replace(/\0.*$/s, "").replace(/[^!-\xff]+$/, "");
      if (from === this.#errors) this.#logs(`stderr: ${fromLatin1(text.replace(/^[^!-\xff]+/, ""))}`);
      else this.#carryOut(text);
      this.#listen();
    }
  }

  #carryOut(line: string): void {
    if (!line) return;
    this.#note("command", fromLatin1(line));
    if (line.length < (this.#version < 1.8 ? 4 : 3)) return;
    const text = fromLatin1(line.slice(2));
    switch (line[0]) {
      case "S":
        return this.#checked("Queue re'S'et", text, () => {
          this.#clear();
          this.#playlist.push(text);
          this.#look();
        });
      case "A":
        return this.#checked("Queue 'A'ppend", text, () => {
          this.#playlist.push(text);
          this.#look();
        });
      case "I":
        if (this.#version < 11) return;
        return this.#checked("Queue 'I'nterrupt", undefined, () => this.#clear());
      case "O":
        return this.#checked("Option", undefined, () => {
          if (/^(no)?autoclear$/i.test(text)) this.#autoclear = !/^no/i.test(text);
          else this.#logs(`Unknown option requested: ${text}`);
        });
      case "T":
        if (!this.#up && (this.#gone || this.#options.answerable === false)) {
          this.#logs("Failed to answer channel");
          return this.#emit("Z", "ANSWER_FAILURE");
        }
        return this.#answer();
      case "D":
        if (this.#version < 1.8) return;
        return this.#send(split(line.slice(2)));
      case "V":
        for (const variable of text.split(",")) {
          const [, name = "", value] = /^([^=]*)=?(.*)$/s.exec(variable)!;
          const key = name.endsWith(")") ? name : name.replace(/^__?/, "");
          Object.defineProperty(this.variables, key, {
            value,
            writable: true,
            enumerable: true,
            configurable: true,
          });
        }
        return;
      case "G":
        return this.#emit("G", this.#get(text.split(",")));
      case "P": {
        const { application = "ivr://localhost", args = [] } = this.#options;
        return this.#emit("P", [application, ...args].join());
      }
      case "L":
        return this.#logs(`Log message from EIVR: ${text}`);
      case "H":
        this.#logs(`Hanging up: ${text}`);
        this.#emit("H");
        return this.#finish("hungup");
      case "E":
      case "X":
        this.#logs(`Exiting: ${text}`);
        if (line[0] === "E") this.#emit("E");
        else this.#logs("e'X'it command is deprecated, use 'E'xit instead");
        // The dialplan of a channel that was hung up does not go on, unless it began there
        return this.#finish(this.#gone && !this.#has("d") ? "hungup" : "continued");
    }
  }

  /** Carries out what needs an answered channel, and a file that exists. */
  #checked(what: string, file: string | undefined, act: () => void): void {
    if (!this.#up || this.#gone) {
      this.#logs(`${what} called on unanswered channel`);
      return this.#emit("Z");
    }
    if (file !== undefined && this.#lengthOf(file) === undefined) {
      this.#logs(`Unknown file requested '${file}'`);
      return this.#emit("Z", this.#version < 1.8 ? undefined : file);
    }
    act();
  }

  /** Presses keys toward the caller, one after the other, and does nothing else meanwhile. */
  #send([keys = "", interval = "", ...rest]: string[]): void {
    const between = Math.max(0, lengthOfTime(interval)) || 250;
    const duration = lengthOfTime(rest.join());
    this.#logs(`Sending DTMF: ${fromLatin1(keys)} ${between} ${duration}`);
    this.#note("sends", fromLatin1(keys));
    const sent = (): void => {
      this.#sending = undefined;
      this.#loop();
    };
    // A hangup ends a pause, and with it all. It ends a key as well, but is forgotten then
    const wait = (ms: number, then: () => void, hungUp = sent): void => {
      if (!this.#hungUp) {
        const timer = ms < Infinity ? this.#clock.after(ms * 1000, then) : undefined;
        this.#sending = { timer, hungUp };
      } else {
        this.#hungUp = false;
        hungUp();
      }
    };
    let at = 0;
    const next = (): void => {
      for (let key; (key = keys[at++]);) {
        const pause = () => wait(between, next);
        if (key === "w") return wait(500, next);
        if (key === "W") return wait(1000, next);
        if (/[fF]/.test(key)) return pause();
        if (/[0-9*#a-dA-D]/.test(key)) return wait(duration < 0 ? Infinity : Math.max(duration, 100), pause, pause);
        this.#logs(`Illegal DTMF character '${fromLatin1(key)}' in string. (0-9*#aAbBcCdD allowed)`);
      }
      sent();
    };
    wait(100, next);
    this.#listen();
  }

  /** Channel variables before globals, no functions, cut as Asterisk's buffer cuts. */
  #get(names: string[]): string {
    const value = (name: string) => {
      if (name.endsWith(")")) return "";
      const place = [this.variables, this.globals].find((place) => Object.hasOwn(place, name));
      return place?.[name] ?? "";
    };
    const data = names.map((name) => `${name}=${value(name)},`).join("");
    return fromBytes(toBytes(data).subarray(0, 2047)).replace(/,$/, "");
  }
}

/** A length of time in milliseconds, as C reads it: a number, and perhaps a unit. What is none is 0. */
function lengthOfTime(text: string): number {
  const time = /^[\t-\r ]*([-+]?(?:0x[\da-f]+|(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?))[\t-\r ]*([^\t-\r ]*)/i;
  const [, number, unit = ""] = time.exec(text) ?? [];
  const ms = ({ h: 3600e3, m: 60e3, s: 1e3, ms: 1, "": 1 } as Record<string, number>)[unit.toLowerCase()];
  return number && ms ? Math.min(Math.trunc(Number(number) * ms), 2 ** 31 - 1) : 0;
}

/** Audio that goes on for a time, but for the time it is paused. */
class Playback {
  #clock: Clock;
  #left: number;
  #end: () => void;
  #began = 0;
  #timer: unknown;
  #paused = true;

  constructor(clock: Clock, length: number, end: () => void) {
    this.#clock = clock;
    this.#left = length;
    this.#end = end;
    this.resume();
  }

  /** Whether its end is still to come. */
  get goesOn(): boolean {
    return this.#paused || this.#timer !== undefined;
  }

  resume(): void {
    if (!this.#paused) return;
    this.#paused = false;
    this.#began = this.#clock.now();
    this.#timer = this.#clock.after(this.#left, () => {
      this.#timer = undefined;
      this.#end();
    });
  }

  pause(): void {
    if (this.#timer === undefined) return;
    this.stop();
    this.#paused = true;
    this.#left -= this.#clock.now() - this.#began;
  }

  stop(): void {
    this.#clock.cancel(this.#timer);
    this.#timer = undefined;
    this.#paused = false;
  }
}

/** What Asterisk reads lines from. Bytes are characters here, U+0000 to U+00FF. */
class Descriptor {
  /** What it could read. */
  arrived = "";
  /** Whether nothing more arrives. */
  ended = false;
  /** What it has read: the line it is at, and what is behind. */
  #line = "";
  #rest = "";
  #stalls: boolean;

  /** Since version 15 Asterisk reads more than a line, and so waits for more than it has to. */
  constructor(version: number) {
    this.#stalls = version >= 15;
  }

  /** Whether Asterisk looks at it: it does not know of what it has read already. */
  get ready(): boolean {
    return this.arrived !== "" || this.ended;
  }

  /**
   * A line with its newline, 1023 bytes of one that is longer, what is left at the end, and then nothing; `undefined` when
   * the rest of it has not arrived.
   */
  gets(): string | undefined {
    for (;;) {
      const room = 1023 - this.#line.length;
      const size = Math.min(this.#rest.indexOf("\n") + 1 || this.#rest.length, room);
      const line = this.#line += this.#rest.slice(0, size);
      this.#rest = this.#rest.slice(size);
      if (line.endsWith("\n") || size === room || !this.arrived && this.ended) {
        this.#line = "";
        return line;
      }
      if (!this.arrived) return undefined;
      const read = this.#stalls ? 2048 : Math.min(this.arrived.indexOf("\n") + 1 || 1023, 1023 - line.length);
      this.#rest = this.arrived.slice(0, read);
      this.arrived = this.arrived.slice(read);
    }
  }
}

function checkKey(key: string): void {
  if (!/^[0-9A-D*#]$/.test(key)) throw new TypeError(`Cannot press "${key}": the keys are 0-9 * # A-D`);
}

// ---------------------------------------------------------------------------------------------------------
// Texts
// ---------------------------------------------------------------------------------------------------------

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/**
 * Bytes as a text: UTF-8, and a byte that is none as the lone half of a surrogate pair, U+DC80 to U+DCFF, so that
 * {@linkcode toBytes} gives the same bytes back.
 *
 * @example A caller's name in Latin-1
 * ```ts
 * import assert from "node:assert/strict";
 * import { fromBytes, toBytes } from "@externalivr/protocol/asterisk";
 *
 * const name = fromBytes(Uint8Array.of(0x4a, 0xf6, 0x72, 0x67));
 * assert.deepEqual(name, "J\udcf6rg");
 * assert.deepEqual(toBytes(name), Uint8Array.of(0x4a, 0xf6, 0x72, 0x67));
 * ```
 */
export function fromBytes(bytes: Uint8Array): string {
  try {
    return strict.decode(bytes);
  } catch { /* some are none */ }
  let text = "";
  for (let at = 0; at < bytes.length;) {
    const first = bytes[at]!;
    const size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    try {
      text += strict.decode(bytes.subarray(at, at + size));
      at += size;
    } catch {
      text += String.fromCharCode(0xdc00 + first);
      at++;
    }
  }
  return text;
}

/** A text as bytes: the other direction of {@linkcode fromBytes}. */
export function toBytes(text: string): Uint8Array<ArrayBuffer> {
  const parts = text.split(/([\udc80-\udcff])/u);
  return new Uint8Array(
    Buffer.concat(parts.map((part, i) => i % 2 ? Buffer.of(part.charCodeAt(0) & 0xff) : Buffer.from(part))),
  );
}

/** Bytes as characters, U+0000 to U+00FF. */
function latin1(bytes: Uint8Array = new Uint8Array()): string {
  return Buffer.from(bytes).toString("latin1");
}

/** The text that these bytes, as characters, are. */
function fromLatin1(bytes: string): string {
  return fromBytes(Buffer.from(bytes, "latin1"));
}

/** The same with the bytes of every text, and of every name, as characters. */
function inLatin1<T>(value: T): T {
  return JSON.parse(JSON.stringify(value), (_, item) => {
    if (typeof item === "string") return latin1(toBytes(item));
    if (item === null || typeof item !== "object" || Array.isArray(item)) return item;
    return Object.fromEntries(Object.entries(item).map(([name, own]) => [latin1(toBytes(name)), own]));
  });
}

/**
 * Reads the text of the dialplan's `ExternalIVR(…)`: `command[(arg1,arg2,…)][,options]`. As in Asterisk the whole text loses
 * its quotes and backslashes before the arguments are split: they do not keep a comma inside of an argument.
 *
 * @throws {SyntaxError} for text that Asterisk would not run.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { parseDialplan } from "@externalivr/protocol/asterisk";
 *
 * assert.deepEqual(parseDialplan("ivr://localhost(sales,2),in"), {
 *   application: "ivr://localhost",
 *   args: ["sales", "2"],
 *   options: "in",
 * });
 * ```
 */
export function parseDialplan(text: string): Dialplan {
  const [command = "", options = ""] = split(text);
  const open = command.indexOf("(");
  const close = command.lastIndexOf(")");
  if (open >= 0 && close < open) {
    throw new SyntaxError(`Cannot read "${text}": the closing parenthesis is missing`);
  }
  const application = open < 0 ? command : command.slice(0, open);
  if (!application) {
    throw new SyntaxError(`Cannot read "${text}": no program and no ivr://host`);
  }
  const unknown = /[^nid]/.exec(options);
  if (unknown) {
    throw new SyntaxError(`Cannot read "${text}": the options are n, i and d, not "${unknown[0]}"`);
  }
  return { application, args: open < 0 || close === open + 1 ? [] : split(command.slice(open + 1, close)), options };
}

/** Splits at commas outside of parentheses, brackets and quotes; a backslash takes the next character as it is. */
function split(text: string): string[] {
  const parts = [""];
  let round = 0;
  let square = 0;
  let quoted = false;
  for (let i = 0; i < text.length; i++) {
    let char = text[i]!;
    if (char === "\\") char = text[++i] ?? "";
    else if (char === "(") round++;
    else if (char === ")") round = Math.max(0, round - 1);
    else if (char === "[") square++;
    else if (char === "]") square = Math.max(0, square - 1);
    else if (char === '"') {
      quoted = !quoted;
      continue;
    } else if (char === "," && !round && !square && !quoted) {
      parts.push("");
      continue;
    }
    parts[parts.length - 1] += char;
  }
  return parts;
}

/**
 * A text as a terminal may show it: what moves the cursor, ends the line or turns the direction of writing is written as an
 * escape, and so is what is no character.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { printable } from "@externalivr/protocol/asterisk";
 *
 * assert.deepEqual(printable("J\x1b[2J\u202eno"), "J\\x1b[2J\\u202eno");
 * ```
 */
export function printable(text: string): string {
  return text.replace(/[\p{Cc}\p{Cs}\p{Bidi_Control}\u2028\u2029]/gu, (char) => {
    const code = char.charCodeAt(0).toString(16);
    return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`;
  });
}

/** What a note says to somebody who reads. */
const SAYS: Record<Note["kind"], (text: string) => string> = {
  event: (text) => `<-- ${text}`,
  command: (text) => `--> ${text}`,
  log: (text) => `log: ${text}`,
  plays: (text) => `playing ${text}`,
  answers: () => "answered",
  caller: (text) => `the caller ${text}`,
  sends: (text) => `sends the keys ${text}`,
  ends: (text) => text === "continued" ? "the dialplan goes on" : "hung up",
};

/**
 * What happened, a {@linkcode printable} line each: when, and what. Left out is what only acknowledges.
 */
export function transcript(notes: Note[]): string {
  const told = notes.filter(({ text }) => !/^G,(?: *-?\d+,)?EIVR_ACK_\d+=?$/.test(text));
  return told.map(({ at, kind, text }) => `${at.toFixed(3).padStart(9)}  ${printable(SAYS[kind](text))}`).join("\n");
}

/** A recording as the text of its file: a line for everything that happens. */
export function formatRecording(recording: Recording): string {
  // An array within an array is one line
  return JSON.stringify(recording, null, 2).replace(
    /(?<=^ {4})\[\n.*?^ {4}\]/gms,
    (array) => array.replace(/\n */g, " "),
  )
    .replace(/(?<=^ {4})\[ (.*) \]/gm, "[$1]") + "\n";
}
