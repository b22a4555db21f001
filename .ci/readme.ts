// Runs what the README shows and `deno test --doc` cannot: its programs and servers, each on its runtime, called by the telephone.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { chmodSync, cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const readme = readFileSync(join(root, "README.md"), "utf8");
const blocks = [...readme.matchAll(/^```ts(?: ignore)?\n([^]*?)^```$/gm)].map(([, code]) => code!);

/** The blocks whose comment says what they are. */
const named = (name: string): string => {
  const found = blocks.filter((code) => code.includes(`// ${name}\n`));
  assert.equal(found.length, 1, `one block "// ${name}"`);
  return found[0]!;
};

const run = (command: string, args: string[], cwd: string): string => {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, encoding: "utf8" });
  assert.equal(status, 0, `${command} ${args.join(" ")}: ${stderr}${stdout}`);
  return stdout;
};

const runtimes = { deno: "deno@2.9.6", bun: "bun@1.4.5", node: "node@24" };
const folder = mkdtempSync(join(tmpdir(), "eivr-readme-"));
process.on("exit", () => rmSync(folder, { recursive: true, force: true }));

// The package as each runtime finds it: Deno by its map of imports, the others as JSR serves it
const bin = join(folder, "bin");
mkdirSync(bin);
for (const [name, pinned] of Object.entries(runtimes)) {
  symlinkSync(run("npx", ["-y", "-p", pinned, "which", name], folder).trim(), join(bin, name));
}
process.env["PATH"] = `${bin}:${process.env["PATH"]}`;
const served = join(folder, "node_modules/@externalivr/protocol");
mkdirSync(served, { recursive: true });
run("npx", ["-y", "esbuild@0.25.12", "mod.ts", `--outfile=${served}/mod.js`, "--log-level=warning"], root);
writeFileSync(join(served, "package.json"), `{ "type": "module", "exports": "./mod.js" }`);
writeFileSync(join(folder, "package.json"), `{ "type": "module" }`);
cpSync(join(root, "mod.ts"), join(folder, "mod.ts"));
writeFileSync(
  join(folder, "deno.json"),
  `{ "imports": { "@externalivr/protocol": "./mod.ts" }, "nodeModulesDir": "none" }`,
);
writeFileSync(join(folder, "menu.ts"), named("menu.ts"));

/** Calls, and expects that the account arrives and the dialplan goes on. */
function call(text: string): void {
  const out = run("deno", ["run", "-A", join(root, "examples/phone.ts"), "--caller", "0.5 1234#", text], root);
  assert.match(out, /--> V,ACCOUNT=1234\n/, out);
  console.log(`README: ${text.split("/").at(-1)} answers`);
}

for (
  const [runtime, first, on] of [
    ["deno", "-S deno run --quiet", "Deno"],
    ["node", "node", "Node and Bun"],
    ["bun", "bun", "Node and Bun"],
  ] as const
) {
  const program = join(folder, `program-${runtime}.ts`);
  writeFileSync(program, named("program.ts on Node, Bun and Deno").replace("env node", `env ${first}`));
  chmodSync(program, 0o755);
  const port = await free();
  const server = join(folder, `server-${runtime}.ts`);
  writeFileSync(server, named(`server.ts on ${on}`).replace("2949", String(port)));
  if (runtime !== "bun") run("deno", ["check", program, server], folder);
  call(program);
  const child = spawn(runtime, [...runtime === "deno" ? ["run", "--allow-net"] : [], server], { stdio: "inherit" });
  try {
    while (!(await answers(port))) assert.equal(child.exitCode, null, "the server ended");
    call(`ivr://127.0.0.1:${port}`);
  } finally {
    child.kill();
  }
}
run("deno", ["task", "phone", "--caller", "0.5 1234#, 4 2"], root);

async function free(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function answers(port: number): Promise<boolean> {
  await new Promise((resolve) => setTimeout(resolve, 50));
  const { connect } = await import("node:net");
  return await new Promise((resolve) => {
    const socket = connect({ port, host: "127.0.0.1" });
    socket.on("connect", () => (socket.destroy(), resolve(true))).on("error", () => resolve(false));
  });
}
process.exit();
