// Everything below the timeline: shares of time, traffic, load of experts. The figures come with the data.

const CAUSES = {
  work: "computing", ramp: "ramp: before the first task of a wave", turn: "turn: between forward and backward",
  channel: "channel: data on its way", "other pool": "other pool: not computed yet",
  "other stage": "other stage: not handed over yet", host: "host: not queued yet", tail: "tail: after the last task",
  after: "gradient reduction, optimizer", end: "waiting for the step's end",
};
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(1) + "%";
const cssName = (name) => name.replace(" ", "-");
const swatch = (name, text) => `<span><i style="background:var(--${cssName(name)})"></i>${text}</span>`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function rows(head, body) {
  const cells = (kind, row) => "<tr>" + row.map((cell) => `<${kind}>${cell}</${kind}>`).join("") + "</tr>";
  return `<div class="scroll"><table>${cells("th", head)}${body.map((row) => cells("td", row)).join("")}</table></div>`;
}

function cards(runs) {
  const [first, second] = runs;
  const made = [["step", duration(first.seconds * 1e6), second && compared(first.seconds, second)]];
  for (const role of ["attention", "expert"]) {
    const busy = (run) => mean(run.ranks.filter((rank) => rank.role === role).map((rank) => rank.parts.work)) / run.seconds;
    made.push([`${role} ranks compute`, percent(busy(first)), second && `${second.name}: ${percent(busy(second))}`]);
  }
  const sent = (run) => run.channels.reduce((sum, channel) => sum + channel.bytes, 0);
  const part = second && second.ranks.length < first.ranks.length ? ", of one ZP group" : "";
  made.push(["sent between ranks", bytes(sent(first)), second && `${second.name}${part}: ${bytes(sent(second))}`]);
  return made.map(([name, value, note]) => `<div class="card"><p>${name}</p><strong>${value}</strong>${note ? `<p>${note}</p>` : ""}</div>`).join("");
}

function compared(seconds, other) {
  const share = seconds / other.seconds - 1;
  if (Math.abs(share) < 0.0005) return `as ${other.name}`;
  const word = `<span class="${share > 0 ? "worse" : "better"}">${percent(Math.abs(share))} ${share > 0 ? "longer" : "shorter"}</span>`;
  return `${word} than ${other.name} (${duration(other.seconds * 1e6)})`;
}

function stack(parts, seconds, under) {
  const pieces = Object.keys(CAUSES).map((name) => {
    const share = parts[name] / seconds;
    return `<i style="width:${100 * share}%;background:var(--${cssName(name)})" title="${CAUSES[name]}: ${duration(parts[name] * 1e6)}, ${percent(share)}"></i>`;
  });
  return `<div class="stack${under ? " under" : ""}">${pieces.join("")}</div>`;
}

function shares(runs) {
  const [first, second] = runs;
  const html = [];
  const line = (name, parts, run, under, rank) =>
    html.push(`<div class="name${under ? " under" : ""}">${name}</div>`, stack(parts, run.seconds, under),
      `<div class="figure${under ? " under" : ""}"${rank === undefined ? "" : ` data-rank="${rank}" data-run="${run.name}"`}>${percent(parts.work / run.seconds)} computing</div>`);
  const average = (ranks) => Object.fromEntries(Object.keys(CAUSES).map((name) => [name, mean(ranks.map((rank) => rank.parts[name]))]));
  for (const pool of new Set(first.ranks.map((rank) => rank.pool))) {
    const inside = (run) => run.ranks.filter((rank) => rank.pool === pool);
    html.push(`<div class="pool">${pool}</div>`);
    if (inside(first).length > 1) line("on average", average(inside(first)), first, false);
    for (const rank of inside(first)) {
      line(`rank ${rank.rank}`, rank.parts, first, false, rank.rank);
      const other = second && second.ranks.find((one) => one.rank === rank.rank);
      if (other) line(second.name, other.parts, second, true, rank.rank);
    }
  }
  return `<div class="shares">${html.join("")}</div>`;
}

function traffic(runs) {
  const meaning = { out: "out: tokens to the experts' holders, gradients of outputs", back: "back: outputs to the tokens' owners, gradients of tokens",
    stages: "stages: hidden states to the next pipeline stage, their gradients to the one before" };
  const body = runs.flatMap((run) => run.channels.map((channel) => [
    meaning[channel.name], run.name, channel.transfers.toLocaleString("en"),
    `<span data-channel="${channel.name}" data-run="${run.name}" data-bytes="${channel.bytes}">${bytes(channel.bytes)}</span>`,
    percent(channel.seconds / run.seconds), bytes(channel.bytes / run.seconds) + "/s",
  ]));
  body.sort((one, other) => (one[0] < other[0] ? 1 : one[0] > other[0] ? -1 : 0));
  const names = runs[0].channels.map((channel) => channel.name);
  const ranks = runs[0].ranks.map((rank) => [`rank ${rank.rank} ${rank.role}`, ...names.map((name) => bytes(rank.sent[name]))]);
  return rows(["channel", "", "transfers", "sent by all ranks", "of the step in transfers", "over the step"], body) +
    `<details><summary>by rank (${runs[0].name})</summary>${rows(["", ...names.map((name) => `sent on ${name}`)], ranks)}</details>`;
}

function load(run) {
  const { layers, holders } = run.load;
  if (!layers.length) return "<p class=hint>No tokens were recorded.</p>";
  const most = Math.max(...layers.flatMap((layer) => layer.tokens)) || 1;
  const width = Math.max(...layers.map((layer) => layer.tokens.length));
  const cells = layers.map((layer) => {
    const usual = mean(layer.tokens);
    return `<span>layer ${layer.layer}</span>` + layer.tokens.map((tokens, expert) =>
      `<i class="${layer.roles[expert]}" style="background:color-mix(in oklab, var(--EB) ${Math.round((100 * tokens) / most)}%, var(--lane))"
        title="layer ${layer.layer}, expert ${expert} on ${layer.names[expert]}: ${tokens.toLocaleString("en")} tokens, ${(usual ? tokens / usual : 0).toFixed(2)} times the layer's mean"></i>`).join("") +
      Array(width - layer.tokens.length).fill("<b></b>").join("");
  });
  const fullest = Math.max(...holders.map((holder) => holder.tokens)) || 1;
  const bars = holders.map((holder) => [
    `rank ${holder.rank} ${holder.role}`, `<i style="width:${(100 * holder.tokens) / fullest}%"></i>`,
    `<span data-holder="${holder.rank}" data-tokens="${holder.tokens}">${holder.tokens.toLocaleString("en")}</span>`, holder.experts,
  ]);
  return `<p class="hint">${run.name}: tokens that each expert got in this step; darker is more. Underlined cells are experts on attention ranks.</p>
    <div class="columns"><div class="heat" style="grid-template-columns:max-content repeat(${width}, minmax(3px, 1fr))">${cells.join("")}</div>
    <div class="load">${rows(["holder", "", "tokens", "experts"], bars)}</div></div>`;
}

const theme = (name) => { document.documentElement.dataset.theme = name; };
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
element("facts").textContent = data.facts.join(" · ");
element("cards").innerHTML = cards(data.runs);
element("legend").innerHTML = Object.entries(KINDS).filter(([kind]) => data.runs.some((run) => run.spans.some((span) => kindOf(span[TASK]) === kind)))
  .map(([kind, text]) => swatch(kind, text)).join("");
element("causes").innerHTML = Object.entries(CAUSES).map(([name, text]) => swatch(name, text)).join("");
element("shares").innerHTML = shares(data.runs);
element("traffic").innerHTML = traffic(data.runs);
element("load").innerHTML = load(data.runs[0]);
if (data.notes.length) element("notes").innerHTML = "<h2>Notes</h2><ul></ul>";
for (const note of data.notes) element("notes").querySelector("ul").appendChild(document.createElement("li")).textContent = note;

const timeline = new Timeline(data.runs, element("timelines"), element("tip"));
element("zoom-in").onclick = () => timeline.zoom(0.6);
element("zoom-out").onclick = () => timeline.zoom(1.7);
element("fit").onclick = () => timeline.fit();
element("theme").onclick = () => {
  theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  timeline.draw();
};
timeline.draw();
