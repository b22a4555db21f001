// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Tests of an IVR without a telephone: {@linkcode dial} places a call to a handler, in a time of its own. Prompts last as
 * long as their files, timeouts run, and a call of five minutes is over in milliseconds.
 *
 * What is virtual in such a call: everything that the handler does with `setTimeout` and `setInterval`, and what it awaits
 * of its session or streams. What is not: files, sockets, `fetch`, `Date`, `AbortSignal.timeout`. The clock does not wait
 * for those, unless they go through {@linkcode VirtualClock.hold}.
 *
 * @example A conversation
 * ```ts
 * import assert from "node:assert/strict";
 * import type { Ivr } from "@externalivr/protocol";
 * import { dial } from "@externalivr/protocol/testing";
 *
 * async function ivr(session: Ivr) {
 *   const { digits } = await session.gather({ prompt: "enter-account", maxDigits: 8 });
 *   await session.set({ ACCOUNT: digits });
 *   await session.play("thank-you");
 *   await session.exit();
 * }
 *
 * const call = dial(ivr, { sounds: { "enter-account": 4, "thank-you": 1.5 } });
 * await call.hears("enter-account");
 * await call.press("1234#");
 * await call.hears("thank-you");
 * await call.hangUp();
 * await call.over();
 * assert.deepEqual(call.variables.ACCOUNT, "1234");
 * ```
 *
 * @module
 */

import { AsyncLocalStorage, AsyncResource } from "node:async_hooks";
import { Buffer } from "node:buffer";
import { setImmediate } from "node:timers";
import { answer, type Ending, type Ivr } from "../mod.ts";
import {
  Asterisk,
  type CallerAction,
  type Clock,
  fromBytes,
  type HostOptions,
  type Left,
  type Note,
  printable,
  type Recording,
  transcript,
} from "./asterisk.ts";

export type { Recording } from "./asterisk.ts";

// ---------------------------------------------------------------------------------------------------------
// A time of its own
// ---------------------------------------------------------------------------------------------------------

interface Timer {
  at: number;
  run: () => void;
}

/** A time that passes only when {@linkcode VirtualClock.step} is called, from timer to timer. */
export class VirtualClock implements Clock {
  #now = 0;
  #timers: Timer[] = [];
  #held = 0;
  #stepping: Promise<void> | undefined;

  /** Microseconds since the clock was made. */
  now(): number {
    return this.#now;
  }

  /** How many timers are set. */
  get pending(): number {
    return this.#timers.length;
  }

  /** Runs something when the time has come; timers of the same time in the order they were set. */
  after(time: number, run: () => void): unknown {
    const timer = { at: this.#now + Math.max(0, Math.round(time)), run };
    let at = this.#timers.length;
    while (at > 0 && this.#timers[at - 1]!.at > timer.at) at--;
    this.#timers.splice(at, 0, timer);
    return timer;
  }

  /** Forgets a timer. */
  cancel(timer: unknown): void {
    const at = this.#timers.indexOf(timer as Timer);
    if (at >= 0) this.#timers.splice(at, 1);
  }

  /** When the next timer is due, if there is one. */
  get next(): number | undefined {
    return this.#timers[0]?.at;
  }

  /** Goes to the next timer, if there is one, and runs it: a step that all take together who wait for it. */
  step(): Promise<void> {
    return this.#stepping ??= this.settle().then(() => {
      this.#stepping = undefined;
      const timer = this.#timers.shift();
      if (!timer) return;
      this.#now = timer.at;
      timer.run();
    });
  }

  /** Lets everything happen that takes no time, and what is held. */
  async settle(): Promise<void> {
    do await new Promise<void>((resolve) => void setImmediate(resolve)); while (this.#held > 0);
  }

  /**
   * Stops the clock until something outside the call is done: a file, a request.
   *
   * @example
   * ```ts
   * import { VirtualClock } from "@externalivr/protocol/testing";
   *
   * const clock = new VirtualClock();
   * await clock.hold(Promise.resolve("the account"));
   * ```
   */
  async hold<T>(outside: Promise<T>): Promise<T> {
    this.#held++;
    try {
      return await outside;
    } finally {
      this.#held--;
    }
  }

  /**
   * Runs code for which `setTimeout` and `setInterval` are this clock's, in all that it calls and awaits until it is
   * done. For everybody else they stay what they were.
   */
  async run<T>(code: () => T | Promise<T>): Promise<T> {
    borrowTimers();
    try {
      return await current.run(this, code);
    } finally {
      returnTimers();
    }
  }
}

const current = new AsyncLocalStorage<VirtualClock>();

/** A timer of a virtual clock, as the runtimes' own look. */
class VirtualTimer {
  clock: VirtualClock;
  timer: unknown;

  constructor(clock: VirtualClock, run: () => void, ms: number, repeat: boolean) {
    this.clock = clock;
    const bound = AsyncResource.bind(run);
    const time = (ms < 2 ** 31 ? ms : 1) * 1000; // as the runtimes do
    const tick = () => {
      if (repeat) this.timer = clock.after(Math.max(1000, time), tick);
      bound();
    };
    this.timer = clock.after(time, tick);
  }

  ref(): this {
    return this;
  }

  unref(): this {
    return this;
  }
}

/** How many calls need the global timers, and what puts them back. */
let borrowers = 0;
let giveBack = (): void => {};

/** Puts the global timers behind a look at whose code calls them. */
function borrowTimers(): void {
  if (borrowers++) return;
  const { setTimeout, setInterval, clearTimeout, clearInterval } = globalThis;
  const own = { setTimeout, setInterval, clearTimeout, clearInterval };
  giveBack = () => void Object.assign(globalThis, own);
  const start = (name: "setTimeout" | "setInterval") => (run: () => void, ms = 0, ...args: unknown[]) => {
    const clock = current.getStore();
    if (!clock) {
      return (own[name] as (...args: unknown[]) => unknown)(run, ms, ...args);
    }
    return new VirtualTimer(clock, () => (run as (...args: unknown[]) => void)(...args), ms, name === "setInterval");
  };
  const stop = (name: "clearTimeout" | "clearInterval") => (timer: unknown) => {
    if (timer instanceof VirtualTimer) timer.clock.cancel(timer.timer);
    else (own[name] as (timer: unknown) => void)(timer);
  };
  Object.assign(globalThis, {
    setTimeout: start("setTimeout"),
    setInterval: start("setInterval"),
    clearTimeout: stop("clearTimeout"),
    clearInterval: stop("clearInterval"),
  });
}

function returnTimers(): void {
  if (!--borrowers) giveBack();
}

// ---------------------------------------------------------------------------------------------------------
// Calls in a time of their own
// ---------------------------------------------------------------------------------------------------------

/** What an IVR gets: a pair of streams, and a third where it is a program. */
export interface Streams {
  /** The events. */
  readable: ReadableStream<Uint8Array>;
  /** The commands. */
  writable: WritableStream<Uint8Array>;
  /** Lines for Asterisk's log, where the application is no `ivr://`. */
  stderr?: WritableStream<Uint8Array>;
}

/** What goes wrong on the way between Asterisk and the IVR. */
export interface Faults {
  /** Events come in chunks of so many bytes. */
  chunk?: number | (() => number);
  /** The connection is reset after so many bytes of events. */
  resetAfter?: number;
  /** The events end after so many bytes, without an `H`. */
  endAfter?: number;
  /** Asterisk takes so many seconds for each chunk of commands; `Infinity` reads nothing at all. */
  readDelay?: number;
}

/** What a call is like. */
export interface DialOptions extends Omit<HostOptions, "clock"> {
  /** What goes wrong. */
  faults?: Faults;
  /** A clock to share with other calls. The default is one of its own. */
  clock?: VirtualClock;
}

/** A script that cannot go on: the message ends with the transcript of the call. */
export class CallError extends Error {
  /** Always `"CallError"`. */
  override name = "CallError";
}

/** As much as a socket's buffers hold, or more. */
const ROOM = { highWaterMark: 1000 };

/** A step that takes an hour of the call's time waits for what never comes: wake-ups go on for ever. */
const PATIENCE = 3600e6;

/**
 * Places a call to a handler that takes a {@linkcode Ivr}.
 *
 * The call goes on while one of its methods is awaited, and no time passes otherwise.
 */
export function dial(
  handler: (ivr: Ivr) => unknown,
  options?: DialOptions,
): Call {
  return new Call(answered(handler), options);
}

/** The call is over when the handler is, as with a program. */
function answered(handler: (ivr: Ivr) => unknown): (streams: Streams) => Promise<Ending> {
  return (streams) => answer(streams, async (ivr) => void await handler(ivr));
}

/**
 * Places a call to a handler that takes the streams themselves. Where the application is a program, it exits when the handler
 * is done.
 */
export function dialStreams(
  handler: (streams: Streams) => unknown,
  options?: DialOptions,
): Call {
  return new Call(handler, options);
}

/** The caller's side of a call that {@linkcode dial} placed. */
export class Call {
  /** The host. */
  readonly host: Asterisk;
  /** The call's clock. */
  readonly clock: VirtualClock;
  /** Everything that happened, in order. */
  readonly notes: Note[] = [];

  #heard = 0;
  #handler: "running" | "done" | "failed" = "running";
  #failure: unknown;
  #left?: Left;
  #turn: Promise<unknown> = Promise.resolve();
  #running: Promise<void>;

  /** Places the call: see {@linkcode dial}. */
  constructor(
    handler: (streams: Streams) => unknown,
    options: DialOptions = {},
  ) {
    this.clock = options.clock ?? new VirtualClock();
    const program = !(options.application ?? "ivr://").startsWith("ivr://");
    const { ivr, host, exit } = this.#connect(program, options.faults ?? {});
    this.host = new Asterisk(host, {
      ...options,
      clock: this.clock,
      onNote: (note) => {
        this.notes.push(note);
        options.onNote?.(note);
      },
    });
    this.host.left.then((left) => this.#left = left);
    this.#running = this.clock.run(async () => {
      try {
        await undefined; // so that the handler may use the call
        await handler(ivr);
        this.#handler = "done";
      } catch (error) {
        this.#handler = "failed";
        this.#failure = error;
      }
      if (program || this.#handler === "failed") exit();
      await this.host.left;
      await this.clock.settle(); // the streams close
    });
  }

  /** The channel's variables as they are now. */
  get variables(): Record<string, string> {
    return this.host.variables;
  }

  /** Asterisk's log. */
  get log(): string[] {
    return this.host.log;
  }

  /** The files that began to play, in order. */
  get heard(): string[] {
    return this.notes.filter(({ kind }) => kind === "plays").map(({ text }) => text);
  }

  /** Waits until a file begins to play; ones before it are passed over. Each beginning counts once. */
  async hears(file: string): Promise<void> {
    await this.until(`"${file}" to play`, () => {
      const at = this.heard.indexOf(file, this.#heard);
      if (at >= 0) this.#heard = at + 1;
      return at >= 0;
    });
  }

  /** Presses keys, one after the other: 100 ms each, 150 ms between them. */
  async press(keys: string): Promise<void> {
    const last = this.plan([[this.host.at, "press", keys]]);
    const due = () => this.clock.next === this.clock.now(); // of several calls that share the time another may be first
    await this.until(`"${keys}" to be pressed`, () => this.host.at >= last && !due());
  }

  /** Hangs up. */
  async hangUp(): Promise<void> {
    this.plan([[this.host.at, "hangup"]]);
    await this.until("the caller to hang up", () => true, true);
  }

  /** Has the caller do things by themselves while the script goes on: see {@linkcode Asterisk.plan}. */
  plan(caller: CallerAction[]): number {
    return this.host.plan(caller);
  }

  /** Lets so many seconds pass. */
  async wait(seconds: number): Promise<void> {
    let done = false;
    this.clock.after(seconds * 1e6, () => done = true);
    await this.until(`${seconds} s to pass`, () => done, true);
  }

  /**
   * Waits for the end of the call and of its handler, and tells where the call went. Rejects with what the handler threw,
   * if it did.
   */
  async over(): Promise<Left> {
    const done = () =>
      this.#handler === "failed" ||
      this.#handler === "done" && this.#left !== undefined;
    await this.until("the call and its handler to end", done, true);
    while (this.#left === undefined) await this.clock.step(); // a handler that failed has left its streams
    await this.#running; // the timers are everybody's again
    if (this.#handler === "failed") throw this.#failure;
    return this.#left!;
  }

  /**
   * Waits for anything: `test` is tried whenever something may have happened. Rejects with a {@linkcode CallError} as soon
   * as nothing more can happen, when the call ends (unless `after` it is fine), and when an hour of its time has passed.
   */
  until(what: string, test: () => boolean, after = false): Promise<void> {
    const step = new CallError(`Waited for ${what}`); // here, so that its stack leads to the script
    const turn = this.#turn.then(() => this.#until(step, test, after));
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /** The call so far, a line for everything that happened but acknowledgements: when, what, and the text. */
  transcript(): string {
    return transcript(this.notes);
  }

  /** The call so far, as recordings are written. Of the {@linkcode Faults} only what they did to it is recorded. */
  recording(): Recording {
    return this.host.recording();
  }

  async #until(step: CallError, test: () => boolean, after: boolean): Promise<void> {
    const began = this.clock.now();
    for (;;) {
      await this.clock.settle();
      if (test()) return;
      const why = this.#whyNot(began, after);
      if (why) {
        const { message, stack } = step; // made as soon as it is asked for, with the message of that time
        step.message = `${printable(`${message}, but ${why}`)}\n${this.transcript()}`;
        if (stack) step.stack = stack.replace(message, () => step.message);
        if (this.#handler === "failed") step.cause = this.#failure;
        throw step;
      }
      await this.clock.step();
    }
  }

  /** Why a step that began then can go on no more, if it cannot. */
  #whyNot(began: number, after: boolean): string | undefined {
    if (this.#handler === "failed") return `the handler failed: ${this.#failure}`;
    if (this.#left !== undefined && !after) return "the call is over";
    if ((this.clock.next ?? Infinity) <= began + PATIENCE) return undefined;
    if (this.#handler === "done") return "nothing more can happen: the handler is done";
    return "nothing more can happen (a handler that awaits a file or a request needs VirtualClock.hold)";
  }

  /** The streams of both sides, with what goes wrong between them, and what ends all that go to Asterisk. */
  #connect(
    program: boolean,
    { chunk = Infinity, resetAfter, endAfter, readDelay }: Faults,
  ): { ivr: Streams; host: ConstructorParameters<typeof Asterisk>[0]; exit: () => void } {
    const commands = this.#pipe(readDelay);
    const errors = program ? this.#pipe(readDelay) : undefined;
    let sent = 0;
    const events = new TransformStream<Uint8Array, Uint8Array>(
      {
        transform: (bytes, controller) => {
          while (bytes.length) {
            const size = Math.max(1, typeof chunk === "function" ? chunk() : chunk);
            const piece = bytes.slice(
              0,
              Math.min(size, (resetAfter ?? Infinity) - sent, (endAfter ?? Infinity) - sent),
            );
            bytes = bytes.slice(piece.length);
            if (piece.length) controller.enqueue(piece);
            sent += piece.length;
            if (sent === endAfter) return controller.terminate();
            if (sent === resetAfter) {
              const reset = new Error("Connection reset by peer");
              commands.reset(reset);
              return controller.error(reset);
            }
          }
        },
      },
      ROOM,
      ROOM,
    );
    return {
      ivr: { readable: events.readable, writable: commands.writable, ...errors && { stderr: errors.writable } },
      host: { readable: commands.readable, writable: events.writable, ...errors && { stderr: errors.readable } },
      exit: () => [commands, errors].forEach((pipe) => pipe?.exit()),
    };
  }

  /** A stream to Asterisk. */
  #pipe(delay?: number) {
    let controller!: TransformStreamDefaultController<Uint8Array>;
    const { readable, writable } = new TransformStream<Uint8Array, Uint8Array>(
      {
        start: (own) => void (controller = own),
        transform: async (bytes) => {
          if (delay === Infinity) await new Promise(() => {});
          if (delay) await new Promise<void>((resolve) => this.clock.after(delay * 1e6, resolve));
          controller.enqueue(bytes);
        },
      },
      ROOM,
      ROOM,
    );
    return {
      readable,
      writable,
      reset: (error: Error) => controller.error(error),
      exit: () => controller.terminate(),
    };
  }
}

/**
 * Plays a recording: its caller against a handler, or, without one, against the very commands that were recorded. Resolves
 * with the recording of what happened now, and tells `onNote` of it meanwhile.
 *
 * @example
 * ```ts
 * import assert from "node:assert/strict";
 * import { dial, replay } from "@externalivr/protocol/testing";
 *
 * const call = dial((ivr) => ivr.exit("done"), { epoch: 1795372484 });
 * await call.over();
 * const recording = call.recording();
 * assert.deepEqual((await replay(recording)).log, recording.log);
 * ```
 */
export async function replay(
  recording: Recording,
  handler?: (ivr: Ivr) => unknown,
  onNote?: (note: Note) => void,
): Promise<Recording> {
  const { caller, steps, received, ended, log: _, ...texts } = recording;
  const options: typeof texts = JSON.parse(fromBytes(Buffer.from(JSON.stringify(texts), "latin1")));
  const [[first = "0"] = []] = received.map(([, line]) => line.split(",").slice(1));
  const at = received[0]?.[0] ?? 0;
  let stopped: number | undefined;

  const perform = async ({ readable, writable, stderr }: Streams) => {
    const writers = { stdout: writable.getWriter(), stderr: stderr?.getWriter() };
    const send = (text: string | null, to: "stdout" | "stderr" = "stdout") =>
      (text === null ? writers[to]?.close() : writers[to]?.write(new Uint8Array(Buffer.from(text, "latin1"))))
        ?.catch(() => {}); // the call may be over
    const reading = readable.pipeTo(new WritableStream()).catch(() => {});
    for (const [at, text, to] of steps) {
      await new Promise((resolve) => setTimeout(resolve, (at - call.host.at) * 1000));
      await send(text, to);
    }
    if (!ended) {
      const rest = (received.at(-1)?.[0] ?? 0) - call.host.at; // what came behind the last command
      await new Promise((resolve) => setTimeout(resolve, Math.max(5, rest) * 1000)); // as long as a recorder waits for an end
      stopped = call.host.at;
      await Promise.all([send(null), send(null, "stderr")]);
    }
    await reading;
  };
  const call: Call = new Call(handler ? answered(handler) : perform, {
    ...options,
    epoch: Number(first) - at,
    ...onNote && { onNote },
  });
  call.plan(caller);
  await call.over();
  const now = call.recording();
  if (stopped === undefined) return now;
  const before = ([at]: readonly [number, string]) => at <= stopped!;
  return { ...now, received: now.received.filter(before), ended: now.ended && before(now.ended) ? now.ended : null };
}
