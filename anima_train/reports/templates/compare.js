"use strict";
const rows = [...document.querySelectorAll(".grid tr")], pictures = rows.filter((row) => "prompt" in row.dataset);
const columns = [...document.querySelectorAll(".grid th[data-checkpoint]")], boxes = {};
const field = document.createElement("input"), found = document.createElement("p");
Object.assign(field, { type: "search", placeholder: "words of the prompt" });
field.setAttribute("aria-label", "show only prompts that have these words");
found.className = "note";
document.querySelector("h1").after(field, found);
for (const key of ["strength", "checkpoint"]) {
  const values = [...new Set(columns.slice(1).map((column) => column.dataset[key]).filter(Boolean))];
  boxes[key] = new Map();
  if (values.length < 2) continue;
  const set = document.createElement("fieldset");
  set.append(`${key}: `);
  for (const value of values) {
    const label = document.createElement("label"), box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: true });
    label.append(box, ` ${value}`);
    set.append(label);
    boxes[key].set(value, box);
  }
  field.after(set);
}
const isChosen = (column) => ["checkpoint", "strength"].every(
  (key) => boxes[key].get(column.dataset[key])?.checked ?? true);
const show = () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = columns.map(isChosen);
  for (const row of pictures)
    row.hidden = !words.every((word) => row.dataset.prompt.toLowerCase().includes(word));
  for (const row of rows) for (const cell of row.cells)
    cell.hidden = cell.cellIndex > 0 && !shown[cell.cellIndex - 1];
  found.textContent = words.length ? `${pictures.filter((row) => !row.hidden).length} of ${pictures.length} prompts` : "";
};
document.addEventListener("input", show);
