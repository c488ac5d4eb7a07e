"use strict";
// The timeline: a canvas for each run, all on one time axis. Times are in microseconds.

const KINDS = {
  AF: "attention forward", AB: "attention backward", AW: "attention weights", EF: "experts forward",
  EB: "experts backward", EW: "experts weights",
  HF: "handover between stages", HB: "handover backward",
  DF: "dispatch", CF: "combine", CB: "combine backward", DB: "dispatch backward",
  reduce: "gradient reduction", optimizer: "optimizer step",
};
const DARK_TEXT = new Set(["AF", "EF", "EB", "DF", "CF", "HF", "reduce"]);
const GUTTER = 132, AXIS = 26, HEADER = 26;
const CHANNELS = ["out", "back", "stages"], STAGES = 3, STEP = 4; // streams: compute is 0
const [RANK, STREAM, TASK, START, END, SENT, TOKENS, HOST, LEAD] = [0, 1, 2, 3, 4, 5, 6, 7, 8]; // the last two on a GPU only

const kindOf = (task) => (task.includes("_") ? task.slice(0, 2) : task);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function duration(us) {
  if (us >= 1e6) return (us / 1e6).toFixed(us >= 1e7 ? 1 : 3) + " s";
  if (us >= 1e3) return (us / 1e3).toFixed(us >= 1e5 ? 1 : us >= 1e4 ? 2 : 3) + " ms";
  return us.toFixed(1) + " µs";
}

function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (count >= size) return (count / size).toFixed(count >= 100 * size ? 0 : count >= 10 * size ? 1 : 2) + " " + unit;
  return Math.round(count) + " B";
}

class Timeline {
  // runs: [{name, seconds, ranks, spans}], drawn one below the other.
  constructor(runs, parent, tip) {
    this.runs = runs;
    this.tip = tip;
    this.length = Math.max(...runs.map((run) => run.seconds * 1e6));
    this.view = [0, this.length];
    this.panels = runs.map((run, index) => this.panel(run, index, parent));
    new ResizeObserver(() => this.draw()).observe(parent);
  }

  panel(run, index, parent) {
    const crowded = run.ranks.length > 12;
    const heights = crowded ? [13, 5, 5] : [22, 11, 11];
    if (run.spans.some((span) => span[STREAM] === STAGES)) heights.push(heights[2]);
    const band = heights.reduce((a, b) => a + b, 0) + (crowded ? 6 : 12);
    const lanes = run.ranks.flatMap(({ rank }, row) => {
      const top = (index ? HEADER : AXIS + HEADER) + row * band;
      return heights.map((height, stream) => ({
        rank, stream, height: height - (stream ? 1 : 0), top: top + heights.slice(0, stream).reduce((a, b) => a + b, 0),
        spans: [],
      }));
    });
    const byKey = new Map(lanes.map((lane) => [lane.rank * STEP + lane.stream, lane]));
    run.spans.forEach((span, number) => {
      const lane = byKey.get(span[RANK] * STEP + (span[STREAM] === STEP ? 0 : span[STREAM]));
      lane.spans.push(Object.assign(span, { number }));
    });
    lanes.forEach((lane) => lane.spans.sort((one, other) => one[START] - other[START]));
    const canvas = parent.appendChild(document.createElement("canvas"));
    const height = (index ? HEADER : AXIS + HEADER) + run.ranks.length * band;
    canvas.style.height = height + "px";
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${run.name} timeline of ${run.ranks.length} ranks`);
    const panel = { run, index, canvas, lanes, height, band, heights, crowded };
    this.listen(panel);
    return panel;
  }

  x(time, width) {
    return GUTTER + ((time - this.view[0]) / (this.view[1] - this.view[0])) * (width - GUTTER);
  }

  draw() {
    this.panels.forEach((panel) => this.drawPanel(panel));
  }

  drawPanel(panel) {
    const { canvas, run, lanes, height } = panel;
    const width = canvas.clientWidth;
    if (!width) return;
    const scale = Math.min(window.devicePixelRatio || 1, 16000 / height);
    canvas.width = width * scale;
    canvas.height = height * scale;
    const ctx = canvas.getContext("2d");
    ctx.scale(scale, scale);
    ctx.textBaseline = "middle";
    const ink = style("ink"), soft = style("soft"), laneColour = style("lane");
    const colours = Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, style(kind)]));
    this.drawAxis(ctx, panel, width, soft);
    ctx.font = "600 13px system-ui, sans-serif";
    ctx.textAlign = "left";
    ctx.fillStyle = ink;
    const above = panel.index ? HEADER / 2 : AXIS + HEADER / 2;
    ctx.fillText(`${run.name}, ${duration(run.seconds * 1e6)}`, 0, above);
    for (const lane of lanes) {
      ctx.fillStyle = laneColour;
      ctx.fillRect(GUTTER, lane.top, width - GUTTER, lane.height);
      this.drawLane(ctx, lane, width, colours);
    }
    run.ranks.forEach((entry, row) => {
      const lane = lanes[panel.heights.length * row];
      ctx.textAlign = "left";
      ctx.fillStyle = ink;
      ctx.font = `500 ${panel.crowded ? 11 : 12.5}px system-ui, sans-serif`;
      ctx.fillText(`rank ${entry.rank}`, 0, lane.top + lane.height / 2);
      const offset = ctx.measureText(`rank ${entry.rank} `).width;
      ctx.fillStyle = soft;
      ctx.fillText(entry.role, offset, lane.top + lane.height / 2);
      if (panel.crowded) return;
      ctx.font = "10px system-ui, sans-serif";
      if (entry.stage) ctx.fillText(`stage ${entry.stage}`, 0, lanes[panel.heights.length * row + 1].top + 5);
      CHANNELS.slice(0, panel.heights.length - 1).forEach((name, below) => {
        ctx.textAlign = "right";
        ctx.fillText(name, GUTTER - 8, lanes[panel.heights.length * row + 1 + below].top + 5);
      });
    });
    this.drawMarks(ctx, panel, width);
  }

  drawAxis(ctx, panel, width, soft) {
    const span = this.view[1] - this.view[0];
    const rough = span / Math.max(2, (width - GUTTER) / 110);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textAlign = "center";
    for (let time = Math.ceil(this.view[0] / step) * step; time <= this.view[1]; time += step) {
      const x = Math.round(this.x(time, width)) + 0.5;
      ctx.strokeStyle = style("grid");
      ctx.beginPath();
      ctx.moveTo(x, panel.index ? 0 : AXIS - 4);
      ctx.lineTo(x, panel.height);
      ctx.stroke();
      if (panel.index) continue;
      ctx.fillStyle = soft;
      const unit = step >= 1e6 ? [1e6, " s"] : step >= 1e3 || this.length >= 1e5 ? [1e3, " ms"] : [1, " µs"];
      const digits = Math.max(0, -Math.floor(Math.log10(step / unit[0]) + 1e-9));
      ctx.fillText((time / unit[0]).toFixed(Math.min(3, digits)) + unit[1], Math.min(x, width - 22), AXIS / 2);
    }
  }

  drawLane(ctx, lane, width, colours) {
    ctx.save();
    ctx.beginPath();
    ctx.rect(GUTTER, lane.top - 1, width - GUTTER, lane.height + 2);
    ctx.clip();
    ctx.textAlign = "center";
    ctx.font = "10.5px system-ui, sans-serif";
    let drawnTo = -1;
    for (const span of lane.spans) {
      if (span[END] < this.view[0]) continue;
      if (span[START] > this.view[1]) break;
      const left = this.x(span[START], width), right = this.x(span[END], width);
      if (right - left < 0.5 && right <= drawnTo) continue; // a pixel that has its colour already
      const kind = kindOf(span[TASK]);
      ctx.fillStyle = colours[kind];
      const gap = right - left > 4 ? 0.75 : 0;
      ctx.fillRect(left, lane.top, Math.max(right - left - gap, 0.5), lane.height);
      drawnTo = Math.max(drawnTo, Math.ceil(right));
      if (lane.stream || right - left < 24 || lane.height < 12) continue;
      const text = span[STREAM] === STEP ? kind : span[TASK].slice(3);
      if (ctx.measureText(text).width > right - left - 6) continue;
      ctx.fillStyle = DARK_TEXT.has(kind) ? "#16202a" : "#ffffff";
      ctx.fillText(text, (Math.max(left, GUTTER) + Math.min(right, width)) / 2, lane.top + lane.height / 2 + 0.5);
    }
    ctx.restore();
  }

  // Outlines the hovered task on every rank and in every run.
  drawMarks(ctx, panel, width) {
    if (!this.hovered) return;
    ctx.strokeStyle = style("mark");
    for (const lane of panel.lanes)
      for (const span of lane.spans) {
        if (span[TASK] !== this.hovered[TASK]) continue;
        const left = Math.max(GUTTER, this.x(span[START], width)), right = Math.min(width, this.x(span[END], width));
        ctx.lineWidth = span === this.hovered ? 2.5 : 1.25;
        if (right >= left) ctx.strokeRect(left, lane.top, Math.max(right - left, 1.5), lane.height);
      }
    ctx.lineWidth = 1;
  }

  listen(panel) {
    const { canvas } = panel;
    let drag = null;
    canvas.addEventListener("mousemove", (event) => {
      if (drag) {
        const time = ((drag.x - event.clientX) / (canvas.clientWidth - GUTTER)) * (drag.view[1] - drag.view[0]);
        this.show(drag.view[0] + time, drag.view[1] + time);
      } else this.hover(panel, event);
    });
    canvas.addEventListener("mouseleave", () => this.leave());
    canvas.addEventListener("mousedown", (event) => {
      drag = { x: event.clientX, view: [...this.view] };
      canvas.classList.add("dragging");
      this.leave();
    });
    window.addEventListener("mouseup", () => {
      drag = null;
      canvas.classList.remove("dragging");
    });
    canvas.addEventListener("dblclick", (event) => this.zoom(0.4, this.timeAt(canvas, event)));
    canvas.addEventListener("wheel", (event) => {
      const span = this.view[1] - this.view[0];
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(event.deltaY / 250), this.timeAt(canvas, event));
      else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        const by = ((event.deltaX || event.deltaY) / 1000) * span;
        this.show(this.view[0] + by, this.view[1] + by);
      } else return; // the page scrolls
      event.preventDefault();
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const span = this.view[1] - this.view[0];
      const act = {
        "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1.7), "0": () => this.fit(),
        ArrowLeft: () => this.show(this.view[0] - span / 8, this.view[1] - span / 8),
        ArrowRight: () => this.show(this.view[0] + span / 8, this.view[1] + span / 8),
      }[event.key];
      if (!act) return;
      act();
      event.preventDefault();
    });
  }

  timeAt(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const share = Math.max(0, (event.clientX - box.left - GUTTER) / (box.width - GUTTER));
    return this.view[0] + share * (this.view[1] - this.view[0]);
  }

  fit() {
    this.show(0, this.length);
  }

  zoom(factor, around = (this.view[0] + this.view[1]) / 2) {
    const span = Math.min(this.length, Math.max(5, (this.view[1] - this.view[0]) * factor));
    const start = around - ((around - this.view[0]) / (this.view[1] - this.view[0])) * span;
    this.show(start, start + span);
  }

  // Shows a stretch of time, moved inside the step where it reaches beyond.
  show(start, end) {
    const span = Math.min(end - start, this.length);
    const from = Math.min(Math.max(0, start), this.length - span);
    this.view = [from, from + span];
    this.draw();
  }

  spanAt(panel, event) {
    const box = panel.canvas.getBoundingClientRect();
    const y = event.clientY - box.top;
    const lane = panel.lanes.find((one) => y >= one.top && y < one.top + one.height + 1);
    if (!lane || event.clientX - box.left < GUTTER) return null;
    const time = this.timeAt(panel.canvas, event);
    const slack = ((this.view[1] - this.view[0]) / (box.width - GUTTER)) * 1.5; // so that a thin task can be met
    return lane.spans.findLast((span) => span[START] - slack <= time && time <= span[END] + slack) || null;
  }

  hover(panel, event) {
    const span = this.spanAt(panel, event);
    if (span !== this.hovered) {
      this.hovered = span;
      this.draw();
    }
    this.tip.hidden = !span;
    if (!span) return;
    this.tip.innerHTML = this.describe(panel.run, span);
    const width = this.tip.offsetWidth, height = this.tip.offsetHeight;
    this.tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
    this.tip.style.top = (event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18) + "px";
  }

  leave() {
    this.tip.hidden = true;
    if (!this.hovered) return;
    this.hovered = null;
    this.draw();
  }

  describe(run, span) {
    const [layer, microbatch] = span[TASK].includes("_") ? span[TASK].slice(3).split(",") : [];
    const { role, stage } = run.ranks.find((entry) => entry.rank === span[RANK]);
    const rows = [["rank", `${span[RANK]}, ${role}${stage ? `, stage ${stage}` : ""}`]];
    if (layer) rows.push(["layer", layer], ["microbatch", microbatch]);
    rows.push(["start", duration(span[START])], ["duration", duration(span[END] - span[START])]);
    for (const other of this.runs) {
      const same = other !== run && other.spans.find((one) => one[TASK] === span[TASK] && one[RANK] === span[RANK]);
      if (same) rows.push([other.name, duration(same[END] - same[START])]);
    }
    if (span[SENT]) rows.push(["sent", bytes(span[SENT])]);
    if (span[TOKENS]) rows.push(["tokens", span[TOKENS].toLocaleString("en")]);
    if (span.length > HOST) {
      rows.push(["queued by the host in", duration(span[HOST])]);
      rows.push([span[LEAD] < 0 ? "the GPU came before, by" : "before the GPU came, by", duration(Math.abs(span[LEAD]))]);
    }
    const name = layer ? `${KINDS[kindOf(span[TASK])]} ${span[TASK]}` : KINDS[span[TASK]];
    return `<b>${name}</b><table>${rows.map(([key, value]) => `<tr><td>${key}</td><td>${value}</td></tr>`).join("")}</table>`;
  }

  // Where a span is on the page: {left, right, top, bottom} in CSS pixels of the window.
  boxOf(run, number) {
    const panel = this.panels[run];
    const lane = panel.lanes.find((one) => one.spans.some((span) => span.number === number));
    const span = lane.spans.find((one) => one.number === number);
    const box = panel.canvas.getBoundingClientRect();
    const at = (time) => box.left + this.x(time, box.width);
    return { left: at(span[START]), right: at(span[END]), top: box.top + lane.top, bottom: box.top + lane.top + lane.height };
  }
}
