"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const picker = document.getElementById("layer");
const details = document.getElementById("details");
// Number of the text and position in it, for each colored token.
const places = new Map();
document.querySelectorAll(".text").forEach((text, t) => {
  Array.from(text.children).forEach((span, i) => places.set(span, [t, i]));
});
let current = document.querySelector(".text span");

// The route of a token in a layer lists experts and margins: [expert, margin, expert, ...].
const fanOut = (t, i, layer) => data.texts[t].routes[layer][i].length / 2;
const meanFanOut = (t, i) =>
  data.layers.reduce((sum, _, layer) => sum + fanOut(t, i, layer), 0) / data.layers.length;
// All layers have the same scale, so that they can be compared.
let mostOfMean = 1, mostOfLayer = 1;
for (const [t, i] of places.values()) {
  mostOfMean = Math.max(mostOfMean, meanFanOut(t, i));
  data.layers.forEach((_, l) => { mostOfLayer = Math.max(mostOfLayer, fanOut(t, i, l)); });
}

function paint() {
  const layer = picker.value === "mean" ? null : Number(picker.value);
  const most = layer === null ? mostOfMean : mostOfLayer;
  for (const [span, [t, i]] of places) {
    const value = layer === null ? meanFanOut(t, i) : fanOut(t, i, layer);
    span.style.setProperty("--f", (value / most).toFixed(3));
  }
  const scale = document.getElementById("scale");
  const steps = layer !== null && most <= 8 ? most : 4;
  scale.replaceChildren(...Array.from({ length: steps + 1 }, (_, step) => {
    const value = most * step / steps;
    const box = element("span", Number.isInteger(value) ? String(value) : value.toFixed(1));
    box.style.setProperty("--f", step / steps);
    return box;
  }));
  show(current);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

const nats = (loss) => loss == null ? "none (nothing predicts it)" : loss.toFixed(2) + " nats";

function show(span) {
  if (!span) return;
  const [t, i] = places.get(span);
  const text = data.texts[t];
  const head = element("p", "");
  head.append(element("code", JSON.stringify(text.tokens[i])), ` token ${i + 1} of ` +
    `${text.tokens.length}. Its loss: ${nats(text.losses[i])}. Loss of the next: ` +
    (i + 1 < text.losses.length ? nats(text.losses[i + 1]) : "none (the text ends)") +
    `. Experts: ${meanFanOut(t, i).toFixed(2)} on average.`);
  const table = document.createElement("table");
  data.layers.forEach((number, layer) => {
    const route = text.routes[layer][i];
    const named = [];
    for (let at = 0; at < route.length; at += 2) {
      const margin = route[at + 1];
      const shown = margin === null ? "∞" : (margin < 0 ? "" : "+") + margin.toFixed(3);
      named.push(`expert ${route[at]} (${shown})`);
    }
    const row = table.insertRow();
    if (picker.value === String(layer)) row.className = "chosen";
    row.append(element("td", `layer ${number}`), element("td", named.join(", ") || "no expert"));
  });
  details.replaceChildren(head, table);
}

// Only the current token is a tab stop; the arrow keys move between tokens.
function focusOn(span) {
  if (!span) return;
  if (current) current.tabIndex = -1;
  current = span;
  span.tabIndex = 0;
  span.focus();
}

const spans = Array.from(places.keys());
const order = new Map(spans.map((span, at) => [span, at]));
const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 };
document.addEventListener("keydown", (event) => {
  if (!places.has(event.target) || event.ctrlKey || event.altKey || event.metaKey) return;
  const at = order.get(event.target);
  let next = null;
  if (event.key in steps) next = at + steps[event.key];
  else if (event.key === "Home") next = 0;
  else if (event.key === "End") next = spans.length - 1;
  else return;
  event.preventDefault();
  focusOn(spans[Math.min(Math.max(next, 0), spans.length - 1)]);
});
document.addEventListener("focusin", (event) => {
  if (places.has(event.target)) { current = event.target; show(current); }
});
document.addEventListener("mouseover", (event) => {
  if (places.has(event.target)) show(event.target);
});
document.addEventListener("click", (event) => {
  if (places.has(event.target)) focusOn(event.target);
});
document.querySelectorAll(".text").forEach((text) => {
  text.addEventListener("mouseleave", () => show(current));
});
picker.addEventListener("change", paint);

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");
button.addEventListener("click", () => {
  const next = themes[(themes.indexOf(button.value) + 1) % themes.length];
  button.value = next;
  button.textContent = `Theme: ${next}`;
  document.documentElement.style.colorScheme = next === "auto" ? "light dark" : next;
});

if (current) current.tabIndex = 0;
paint();
