// Makes examples/phone.svg from a real run of the telephone, or with --check says whether it is still what a run makes.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";

const root = new URL("../", import.meta.url);
const picture = new URL("examples/phone.svg", root);

const COLORS: [RegExp, string][] = [
  [/^-->/, "#79c0ff"],
  [/^the caller/, "#ffa657"],
  [/^playing/, "#7ee787"],
  [/^log/, "#8b949e"],
];

/** What a call says, without its times, which no two runs share. */
function call(): string[] {
  const { status, stdout, stderr } = spawnSync("npx", [
    ..."-y deno@2.9.6 task --quiet phone --caller".split(" "),
    "2.5 1234#, 9 2",
  ], { cwd: fileURLToPath(root), encoding: "utf8" });
  assert.equal(status, 0, stderr);
  const lines: string[] = [];
  for (const line of stdout.trimEnd().split("\n").map((line) => line.slice(10).trim())) {
    const [, key] = /^the caller presses (.)$/.exec(line) ?? [];
    if (/^<--|^--> [^VE]/.test(line)) continue; // what is seen as it plays and is pressed
    if (key && lines.at(-1)?.startsWith("the caller")) lines.push(`${lines.pop()} ${key}`);
    else lines.push(line);
  }
  return lines;
}

/** Each line appears in its turn; then the call begins again. */
function draw(lines: string[]): string {
  const step = 0.6;
  const rest = 4;
  const total = lines.length * step + rest;
  const escape = (text: string) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const rows = lines.map((line, i) => {
    const color = COLORS.find(([pattern]) => pattern.test(line))?.[1] ?? "#e6edf3";
    const from = (i * step / total * 100).toFixed(2);
    return `<style>@keyframes l${i}{0%,${from}%{opacity:0}${(Number(from) + 0.01).toFixed(2)}%,100%{opacity:1}}</style>
<text x="20" y="${64 + i * 20}" fill="${color}" style="animation:l${i} ${total.toFixed(1)}s infinite">${
      escape(line)
    }</text>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="640" height="${
    80 + lines.length * 20
  }" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14">
<title>A telephone in the terminal calls the example menu</title>
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>
<text x="20" y="34" fill="#e6edf3">$ npx -y deno task phone</text>
${rows.join("\n")}
</svg>
`;
}

const drawn = draw(call());
if (process.argv.includes("--check")) {
  assert.equal(readFileSync(picture, "utf8"), drawn, "examples/phone.svg is old: make it again with .ci/picture.ts");
} else writeFileSync(picture, drawn);
