// Copyright 2026 the ExternalIVR authors. MIT license.

/**
 * Speech for numbers, letters, dates and times: ExternalIVR plays sound files and cannot speak. Each function gives the
 * files that one of Asterisk's own applications plays in English, in order, for `gather` as its prompt or for `queue` one
 * by one. All of them are among Asterisk's core sounds.
 *
 * ```ts
 * import type { Ivr } from "@externalivr/protocol";
 * import * as say from "@externalivr/protocol/say";
 *
 * async function mailbox(ivr: Ivr, messages: number, last: Date): Promise<string> {
 *   const prompt = ["vm-youhave", ...say.number(messages), "vm-messages", "vm-last", ...say.dateTime(last, "Europe/Prague")];
 *   const { digits } = await ivr.gather({ prompt, maxDigits: 1 });
 *   return digits;
 * }
 * ```
 *
 * It imports nothing, and runs wherever the session does.
 *
 * @module
 */

/** Beyond this Asterisk says nothing, on either side of zero. */
const LARGEST = 2_147_483_646;

const SCALES = [[1e9, "billion"], [1e6, "million"], [1e3, "thousand"], [100, "hundred"]] as const;

/** The characters whose files are named after what they are called. */
const CALLED: Record<string, string> = {
  " ": "letters/space",
  "!": "letters/exclaimation-point", // Asterisk's spelling
  "#": "digits/pound",
  "$": "letters/dollar",
  "*": "digits/star",
  "+": "letters/plus",
  "-": "letters/dash",
  ".": "letters/dot",
  "/": "letters/slash",
  "=": "letters/equals",
  "@": "letters/at",
};

/** A whole number, as `SayNumber(-1234)`: minus one thousand two hundred thirty four. */
export function number(value: number): string[] {
  if (typeof value !== "number") throw wrongType(value, "a number");
  if (!Number.isInteger(value) || Math.abs(value) > LARGEST) {
    throw new RangeError(`Cannot say ${value}: it has to be a whole number from -${LARGEST} to ${LARGEST}`);
  }
  return [...(value < 0 ? ["minus"] : []), ...words(Math.abs(value))].map((word) => `digits/${word}`);
}

/** A place in an order, as `SayOrdinal(21)`: twenty first. */
export function ordinal(value: number): string[] {
  const files = number(value);
  if (value === 0) throw new RangeError("Cannot say 0 as an ordinal: Asterisk has no sound for it");
  return [...files.slice(0, -1), files.at(-1)!.replace("/", "/h-")];
}

/** A text digit by digit, as `SayDigits(-12#)`: minus one two pound. Only digits, `*`, `#` and `-` are said. */
export function digits(text: string): string[] {
  return spell(text, (character) => {
    if (character === "-") return "digits/minus";
    return /[*#]/.test(character) ? CALLED[character] : digit(character);
  });
}

/** A text character by character, as `SayAlpha(Box 7)`: b o x space seven. Only the characters of ASCII are said. */
export function alpha(text: string): string[] {
  return spell(text, (character) => {
    if (/[a-z]/i.test(character)) return `letters/${character.toLowerCase()}`;
    const file = CALLED[character] ?? digit(character);
    return file ?? (/[!-~]/.test(character) ? `letters/ascii${character.charCodeAt(0)}` : undefined);
  });
}

/** A text in the radio's alphabet, as `SayPhonetic(A9)`: alpha niner. Only letters, digits and ` !#$*+-./=@` are said. */
export function phonetic(text: string): string[] {
  return spell(text, (character) => {
    if (/[a-z9]/i.test(character)) return `phonetic/${character.toLowerCase()}_p`;
    return CALLED[character] ?? digit(character);
  });
}

/**
 * The time of day, from 1901 on, as `SayUnixTime(EPOCH,ZONE,IMp)`: two oh five p.m. The time zone is named as in
 * `Europe/Prague`; without one it is the system's.
 */
export function time(when: Date, timeZone?: string): string[] {
  const local = inZone(when, timeZone);
  const hour = local.getUTCHours();
  const minute = local.getUTCMinutes();
  return [
    ...number(hour % 12 || 12),
    ...(minute ? twoDigits(minute) : ["digits/oclock"]),
    hour < 12 ? "digits/a-m" : "digits/p-m",
  ];
}

/** The date, from 1901 on, as `SayUnixTime(EPOCH,ZONE,ABdY)`: Friday July fourth two thousand twenty five. */
export function date(when: Date, timeZone?: string): string[] {
  const local = inZone(when, timeZone);
  const year = local.getUTCFullYear();
  return [
    `digits/day-${local.getUTCDay()}`,
    `digits/mon-${local.getUTCMonth()}`,
    ...ordinal(local.getUTCDate()),
    ...(year < 2000 ? [...number(19), ...twoDigits(year - 1900)] : number(year)),
  ];
}

/** The date and the time, from 1901 on, as `SayUnixTime(EPOCH,ZONE)`, whose format is `ABdY 'digits/at' IMp`. */
export function dateTime(when: Date, timeZone?: string): string[] {
  return [...date(when, timeZone), "digits/at", ...time(when, timeZone)];
}

/** The words of a number that is not negative. */
function words(value: number): string[] {
  for (const [size, word] of SCALES) {
    const rest = value % size;
    if (value >= size) return [...words((value - rest) / size), word, ...(rest ? words(rest) : [])];
  }
  const ones = value % 10;
  return value > 20 && ones ? [`${value - ones}`, `${ones}`] : [`${value}`];
}

/** The last two digits of a time or a year: oh five. */
function twoDigits(value: number): string[] {
  return [...(value < 10 ? ["digits/oh"] : []), ...number(value)];
}

function digit(character: string): string | undefined {
  return /\d/.test(character) ? `digits/${character}` : undefined;
}

/** The files of a text's characters. As in Asterisk, those that have none are not said. */
function spell(text: string, file: (character: string) => string | undefined): string[] {
  if (typeof text !== "string") throw wrongType(text, "a string");
  return [...text].flatMap((character) => file(character) ?? []);
}

/** A date that shows in UTC what clocks and calendars in the time zone show. */
function inZone(when: Date, timeZone: string | undefined): Date {
  if (!(when instanceof Date)) throw wrongType(when, "a Date");
  if (!(when.getUTCFullYear() >= 1900)) throw tooEarly(when); // before Christ the years would look like later ones
  const parts = new Intl.DateTimeFormat("en-US", {
    timeZone,
    hourCycle: "h23",
    year: "numeric",
    month: "numeric",
    day: "numeric",
    hour: "numeric",
    minute: "numeric",
  }).formatToParts(when);
  const part = (name: string) => Number(parts.find(({ type }) => type === name)!.value);
  if (part("year") < 1901) throw tooEarly(when);
  return new Date(Date.UTC(part("year"), part("month") - 1, part("day"), part("hour"), part("minute")));
}

function tooEarly(when: Date): RangeError {
  return new RangeError(`Cannot say ${when}: it has to be a time from 1901 on, since Asterisk says no year before`);
}

function wrongType(value: unknown, rule: string): TypeError {
  return new TypeError(`Cannot say ${typeof value === "string" ? JSON.stringify(value) : value}: it has to be ${rule}`);
}
