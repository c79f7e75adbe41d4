// A ComfyUI page in a real browser: one JSON command a line on stdin, one JSON answer a line on stdout.
//
//     node page.mjs <folder of playwright-core> <chromium>
//
// A command is {"do": <name>, ...}; its answer {"ok": <value>} or {"error": <text>}. `page.py` is the other end.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [, , playwright, executablePath] = process.argv;
const { chromium } = createRequire(import.meta.url)(playwright);
const WAIT = 60_000; // For a click: machines that run tests are busy.
const SMALL = { width: 1600, height: 900 };
// What the page puts in front of the user when something is wrong, in the front ends of 0.3.64 and of 0.33.
const TROUBLE = "[role=dialog], [role=alertdialog], [data-testid=error-overlay], .p-toast-message-error";
const RUN = "button[data-testid=queue-button], [data-testid=queue-button] button";

// Root is what this starts as in a container; the browser has no sandbox there.
const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: SMALL });
page.setDefaultTimeout(WAIT);
let said = [];
page.on("console", (m) => said.push({ kind: m.type(), text: m.text(), url: m.location().url }));
page.on("pageerror", (error) => said.push({ kind: "pageerror", text: String(error.stack), url: "" }));

// Runs in the page before its own scripts: what every command there needs.
function tools() {
  const root = () => app.rootGraph ?? app.graph;
  // Every node, those inside of subgraphs too; a subgraph that stands in two places is listed once.
  const nodes = () => [root(), ...root().subgraphs.values()].flatMap((graph) => graph.nodes);

  // How far the pixels of a picture or of a video's frame are from all being one, 0 to 255.
  function spread(element, width, height) {
    const canvas = new OffscreenCanvas(Math.min(width, 256), Math.min(height, 256));
    const context = canvas.getContext("2d");
    context.drawImage(element, 0, 0, canvas.width, canvas.height);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    const green = data.filter((_, place) => place % 4 === 1);
    const mean = green.reduce((sum, value) => sum + value, 0) / green.length;
    return Math.sqrt(green.reduce((sum, value) => sum + (value - mean) ** 2, 0) / green.length);
  }

  function shown(node, element) {
    const video = element instanceof HTMLVideoElement;
    const [width, height] = video ? [element.videoWidth, element.videoHeight] : [element.naturalWidth, element.naturalHeight];
    const ready = width > 0 && height > 0 && (video ? element.readyState >= 2 : element.complete);
    // A picture is drawn on the canvas, in the node's rectangle; a video is an element of the page over it.
    const place = video ? element.getBoundingClientRect() : { width: node.size[0], height: node.size[1] };
    return {
      node: String(node.id), type: node.type, video, width, height, ready, seconds: video ? element.duration : 0,
      across: place.width, down: place.height, spread: ready ? spread(element, width, height) : 0,
    };
  }

  window.vsr = {
    ends: {},
    listen() {
      for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, ({ detail }) => (this.ends[detail.prompt_id] = { kind, detail }));
    },
    // The names of node types that the page does not know.
    missing: () => nodes().filter((node) => node.has_errors || !(node.type in LiteGraph.registered_node_types)).map((node) => node.type),
    set(name, value, type) {
      let count = 0;
      for (const node of nodes().filter((one) => !type || one.type === type))
        for (const widget of node.widgets ?? [])
          if (widget.name === name && typeof widget.value === typeof value) {
            widget.value = value;
            widget.callback?.(value, app.canvas, node);
            count += 1;
          }
      return count;
    },
    // Pairs of nodes of which one covers a part of the other, as large as they are now. Titles stand above a node's place.
    overlaps() {
      const titled = root().nodes.map(({ pos: [x, y], size: [w, h], title }) => ({ x, y: y - 30, right: x + w, down: y + h, title }));
      const meet = (a, b) => a.x < b.right && b.x < a.right && a.y < b.down && b.y < a.down;
      return titled.flatMap((a, k) => titled.slice(k + 1).filter((b) => meet(a, b)).map((b) => [a.title, b.title]));
    },
    // Whether every node that has been given pictures shows some. A video's first frame is drawn a little after it is there.
    shown() {
      const all = vsr.results().filter((one) => one.ready && one.spread > 0);
      return Object.entries(app.nodeOutputs).every(([id, output]) => !output?.images?.length || all.some((one) => one.node === id));
    },
    results: () =>
      root().nodes.flatMap((node) => {
        // Videos and animated pictures are elements of the page, in a widget; plain pictures are drawn on the canvas.
        const inWidgets = (node.widgets ?? []).flatMap((widget) => [...(widget.element?.querySelectorAll("video, img") ?? [])]);
        return (inWidgets.length ? inWidgets : (node.imgs ?? [])).map((element) => shown(node, element));
      }),
  };
}

const active = () => page.evaluate(() => app.extensionManager.workflow.activeWorkflow.path);
// A dialog about missing nodes or files comes after the graph.
const settle = () => page.waitForTimeout(500);

async function ended(id, seconds) {
  await page.waitForFunction((key) => vsr.ends[key], id, { polling: 200, timeout: 1000 * seconds });
  return page.evaluate((key) => vsr.ends[key], id);
}

const commands = {
  async open({ url }) {
    await page.addInitScript(tools);
    await page.goto(url);
    // The page opens a first graph when it knows all nodes.
    const ready = () => window.app?.extensionManager?.spinner === false && app.extensionManager.workflow.activeWorkflow;
    await page.waitForFunction(ready, null, { polling: 100, timeout: 120_000 });
    await page.evaluate(() => vsr.listen());
  },

  // As an artist does it: Templates in the side bar, the pack in the list, the graph's card.
  async template({ pack, name }) {
    const before = await active();
    await page.getByRole("button", { name: "Templates" }).first().click();
    const dialog = page.getByRole("dialog");
    await dialog.getByText(pack, { exact: true }).first().click();
    await dialog.getByTestId(`template-workflow-${name}`).click();
    await dialog.waitFor({ state: "hidden" });
    const other = (path) => app.extensionManager.workflow.activeWorkflow?.path !== path;
    await page.waitForFunction(other, before, { polling: 100 });
    await settle();
  },

  async load({ graph, name }) {
    await page.evaluate(([content, title]) => app.loadGraphData(content, true, true, title).then(() => null), [graph, name]);
    await settle();
  },

  missing: () => page.evaluate(() => vsr.missing()),
  overlaps: () => page.evaluate(() => vsr.overlaps()),
  prompt: () => page.evaluate(async () => (await app.graphToPrompt()).output),
  set: ({ name, value, type }) => page.evaluate((all) => vsr.set(...all), [name, value, type]),
  evaluate: ({ code, value }) => page.evaluate(`(${code})(${JSON.stringify(value ?? null)})`),

  // Presses Run; the end of that run, or the server's refusal.
  async run({ seconds }) {
    const asked = page.waitForResponse((r) => r.request().method() === "POST" && new URL(r.url()).pathname.endsWith("/prompt"));
    await page.locator(RUN).first().click();
    const answer = await asked;
    const body = await answer.json();
    const end = answer.status() === 200 ? await ended(body.prompt_id, seconds) : { kind: "refused", detail: body };
    // The page tells of what went wrong a moment later.
    if (end.kind !== "execution_success") await page.locator(TROUBLE).first().waitFor().catch(() => null);
    return { ...end, prompt_id: body.prompt_id ?? "" };
  },

  // What the nodes show, once all of it has come.
  async results() {
    await page.waitForFunction(() => vsr.shown(), null, { polling: 200 }).catch(() => null);
    return page.evaluate(() => vsr.results());
  },

  trouble: () => page.locator(TROUBLE).evaluateAll((all) => all.filter((e) => e.checkVisibility()).map((e) => e.innerText)),
  // Puts away whatever lies over the graph, so that one graph's trouble is not the next one's.
  async dismiss() {
    for (let tries = 0; tries < 4 && (await commands.trouble()).length; tries += 1) {
      const button = page.locator("[data-testid=error-overlay-dismiss], .p-toast-close-button");
      if (await button.count()) await button.first().click();
      else await page.keyboard.press("Escape");
      await page.waitForTimeout(400);
    }
  },
  console: () => said.splice(0),

  async screenshot({ path, width, height }) {
    await page.setViewportSize({ width, height });
    await page.waitForTimeout(300);
    await page.getByRole("button", { name: /^Fit View/ }).first().click();
    await page.waitForTimeout(1200); // The view glides there.
    await page.screenshot({ path });
    await page.setViewportSize(SMALL);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { do: name, ...rest } = JSON.parse(line);
  let answer;
  try {
    answer = { ok: (await commands[name](rest)) ?? null };
  } catch (error) {
    answer = { error: String(error.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
