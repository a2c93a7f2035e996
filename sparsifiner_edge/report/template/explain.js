"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function opened(layer, patches) {
  const bytes = await unpacked(layer.packed);
  const token = new Uint16Array(bytes.slice(0, 2 * patches).buffer);
  let at = 2 * patches;
  const next = (count) => bytes.subarray(at, (at += count));
  const { tokens, tiles } = layer;
  return {
    ...layer, token, heads: next(tiles * tokens), probes: next(tiles * tokens), deviations: next(tokens),
    onCells: next(tokens),
  };
}

const scaled = (byte, [low, high]) => low + (byte / 255) * (high - low);
const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);

async function start(section, image) {
  const patches = image.rows * image.columns;
  const layers = await Promise.all(image.layers.map((layer) => opened(layer, patches)));
  const reached = { reached: await unpacked(image.reached.ours), dense: await unpacked(image.reached.dense) };
  const canvas = section.querySelector("canvas"), slider = section.querySelector("input"), said = section.querySelector("output");
  const view = section.querySelector("select"), number = section.querySelector(".layer");
  const context = canvas.getContext("2d"), photo = new Image();
  const down = image.height / image.rows, across = image.width / image.columns;
  canvas.width = image.width; canvas.height = image.height;
  let pinned = Math.floor(image.rows / 2) * image.columns + Math.floor(image.columns / 2), over = pinned;

  const values = () => {
    const layer = layers[slider.value];
    if (view.value in reached) return [...reached[view.value]].map((byte) => byte / 255);
    if (view.value === "cells") return [...layer.token].map((token) => layer.onCells[token] / 255);
    if (view.value === "merged") {
      const count = new Map();
      for (const token of layer.token) count.set(token, (count.get(token) || 0) + 1);
      const most = Math.max(2, ...count.values());
      return [...layer.token].map((token) => (count.get(token) - 1) / (most - 1));
    }
    const tile = layer.tiles === 1 ? 0 : Math.floor(layer.token[pinned] / layer.tile);
    return [...layer.token].map((token) => layer.heads[tile * layer.tokens + token] / data.heads);
  };

  const draw = () => {
    const layer = layers[slider.value], shown = values();
    context.drawImage(photo, 0, 0, image.width, image.height);
    shown.forEach((value, patch) => {
      const x = (patch % image.columns) * across, y = Math.floor(patch / image.columns) * down;
      context.fillStyle = `rgba(8, 12, 20, ${0.75 * (1 - value)})`;
      context.fillRect(x, y, across, down);
      context.fillStyle = `rgba(255, 130, 0, ${0.35 * value})`;
      context.fillRect(x, y, across, down);
    });
    context.lineWidth = 1;
    context.strokeStyle = "rgba(255, 255, 255, .8)";
    if (view.value === "merged") {
      context.beginPath();
      layer.token.forEach((token, patch) => {
        const x = (patch % image.columns) * across, y = Math.floor(patch / image.columns) * down;
        if ((patch + 1) % image.columns && layer.token[patch + 1] !== token) { context.moveTo(x + across, y); context.lineTo(x + across, y + down); }
        if (patch + image.columns < patches && layer.token[patch + image.columns] !== token) { context.moveTo(x, y + down); context.lineTo(x + across, y + down); }
      });
      context.stroke();
    }
    context.lineWidth = 2;
    context.strokeStyle = "#5ab0ff";
    context.strokeRect((pinned % image.columns) * across, Math.floor(pinned / image.columns) * down, across, down);
    number.textContent = `${slider.value}`;
    tell();
  };

  const tell = () => {
    const layer = layers[slider.value], token = layer.token[over];
    const tile = layer.tiles === 1 ? 0 : Math.floor(layer.token[pinned] / layer.tile);
    const at = tile * layer.tokens + token, stands = layer.token.filter((other) => other === token).length;
    const probe = scaled(layer.probes[at], layer.probe), deviation = scaled(layer.deviations[token], layer.deviation);
    const parts = [
      filled(data.words.at, { row: Math.floor(over / image.columns), column: over % image.columns }),
      filled(data.words.stands, { count: stands }),
    ];
    if (layer.tiles === 1) parts.push(data.words.all);
    else {
      parts.push(filled(data.words.read, { heads: layer.heads[at], all: data.heads }));
      parts.push(filled(data.words.score, { score: (probe + deviation).toFixed(1), probe: probe.toFixed(1), deviation: deviation.toFixed(1) }));
    }
    said.textContent = parts.join(" · ");
  };

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * image.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * image.rows);
    return Math.min(Math.max(row, 0), image.rows - 1) * image.columns + Math.min(Math.max(column, 0), image.columns - 1);
  };
  canvas.addEventListener("pointermove", (event) => { over = place(event); tell(); });
  canvas.addEventListener("click", (event) => { pinned = over = place(event); draw(); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -image.columns, ArrowDown: image.columns }[event.key];
    if (step === undefined || pinned + step < 0 || pinned + step >= patches) return;
    event.preventDefault();
    pinned = over = pinned + step;
    draw();
  });
  slider.addEventListener("input", draw);
  view.addEventListener("change", draw);
  photo.addEventListener("load", () => { draw(); section.dataset.ready = "yes"; });
  photo.src = image.photo;
}

document.querySelectorAll("section.image").forEach((section, number) => start(section, data.images[number]));
