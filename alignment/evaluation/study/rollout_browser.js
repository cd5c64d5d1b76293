"use strict";
// Filters, sorts and searches the responses of the page's data. All texts become text nodes.
const data = JSON.parse(document.getElementById("rollouts-data").textContent);
const form = document.getElementById("rollouts-form");
const list = document.getElementById("rollouts-list");
const count = document.getElementById("rollouts-count");
const more = document.getElementById("rollouts-more");
const PAGE = 20;
const NUMBER = /^-?\d+(\.\d+)?$/;
let matching = [], shown = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A search ignores case and finds text in prompts and responses.
const texts = data.rows.map((row) =>
  (data.prompts[row.prompt] + "\n" + row.response).toLowerCase());

function valueOf(row, name) {
  const value = name === "gap" ? row.gap : row.scores[name];
  return value === undefined ? null : value;
}

const number = (name) => NUMBER.test(form[name].value.trim()) ? Number(form[name].value) : null;

function matches(row, index) {
  const flag = form.flag.value;
  if (flag === " any" && !row.flags.length) return false;
  if (flag === " none" && row.flags.length) return false;
  if (flag && flag[0] !== " " && !row.flags.includes(flag)) return false;
  if (form.run.value !== "" && row.run !== Number(form.run.value)) return false;
  if (form.from.value && row.from !== form.from.value) return false;
  const first = number("first"), last = number("last");
  if (first !== null && row.step < first) return false;
  if (last !== null && row.step > last) return false;
  const low = number("low"), high = number("high");
  if (low !== null || high !== null) {
    const score = valueOf(row, form.score.value);
    if (score === null || (low !== null && score < low) || (high !== null && score > high)) {
      return false;
    }
  }
  return texts[index].includes(form.search.value.trim().toLowerCase());
}

function ordered(rows) {
  const order = form.order.value, name = form.score.value;
  if (order === "step") return rows;
  const sign = order === "highest" ? -1 : 1;
  return rows.filter((row) => valueOf(row, name) !== null)
    .sort((a, b) => sign * (valueOf(a, name) - valueOf(b, name)))
    .concat(rows.filter((row) => valueOf(row, name) === null));
}

function card(row) {
  const made = element("article", "rollout");
  const where = data.runs.length > 1 ? `${data.runs[row.run]}, ` : "";
  const head = element("p", "", `${where}${row.from}, step ${row.step.toLocaleString("en")}`);
  const scores = Object.entries(row.scores).map(([role, score]) =>
    `${role.replace(/_/g, " ")} ${score === null ? "no score" : score.toFixed(2)}`);
  if (row.gap !== null) scores.push(`gap ${row.gap.toFixed(2)}`);
  head.append(` · ${scores.join(" · ")} `);
  for (const flag of row.flags) head.append(element("span", "flag", flag));
  const prompt = element("details");
  prompt.append(element("summary", "", data.prompts[row.prompt].slice(0, 100)));
  prompt.append(element("div", "text prompt", data.prompts[row.prompt]));
  made.append(head, prompt, element("div", "text", row.response));
  return made;
}

function showMore() {
  for (const row of matching.slice(shown, shown + PAGE)) list.append(card(row));
  shown = Math.min(matching.length, shown + PAGE);
  more.hidden = shown >= matching.length;
  count.textContent = `${matching.length.toLocaleString("en")} of ` +
    `${data.rows.length.toLocaleString("en")} responses match; ${shown} are shown.`;
}

function update() {
  matching = ordered(data.rows.filter(matches));
  shown = 0;
  list.replaceChildren();
  showMore();
}

function options(select, values) {
  for (const [value, text] of values) {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  }
}

const flags = new Map();
for (const row of data.rows) for (const f of row.flags) flags.set(f, (flags.get(f) || 0) + 1);
options(form.flag, [["", "all"], [" any", "any flag"], [" none", "no flag"],
  ...[...flags].sort((a, b) => b[1] - a[1]).map(([f, n]) => [f, `${f.replace(/_/g, " ")} (${n})`])]);
options(form.run, [["", "all"], ...data.runs.map((name, index) => [String(index), name])]);
const sources = [...new Set(data.rows.map((row) => row.from))];
options(form.from, [["", "all"], ...sources.map((name) => [name, name])]);
const roles = [...new Set(data.rows.flatMap((row) => Object.keys(row.scores)))];
if (data.rows.some((row) => row.gap !== null)) roles.unshift("gap");
options(form.score, roles.map((role) => [role, role.replace(/_/g, " ")]));
document.getElementById("rollouts-run").hidden = data.runs.length < 2;
document.getElementById("rollouts-from").hidden = sources.length < 2;
form.hidden = false;
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));
more.addEventListener("click", showMore);
update();
