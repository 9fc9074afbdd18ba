"use strict";
const pictures = [...document.querySelectorAll("[data-label]")], rows = [...document.querySelectorAll(".grid tr")];
const field = document.createElement("input"), found = document.createElement("p");
Object.assign(field, { type: "search", placeholder: "words of the labels" });
field.setAttribute("aria-label", "show only pictures whose labels have these words");
found.className = "note";
document.querySelector("h1").after(field, found);
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const isShown = (picture) => words.every((word) => picture.dataset.label.toLowerCase().includes(word));
  const shown = new Set(pictures.filter(isShown)), columns = new Set();
  for (const picture of pictures) {
    if (picture.matches("td")) picture.style.visibility = shown.has(picture) ? "" : "hidden";
    else picture.hidden = !shown.has(picture);
    if (picture.matches("td") && shown.has(picture)) columns.add(picture.cellIndex);
  }
  for (const row of rows.slice(1)) row.hidden = ![...row.cells].some((cell) => shown.has(cell));
  for (const row of rows) for (const cell of row.cells)
    cell.hidden = cell.cellIndex > 0 && !columns.has(cell.cellIndex);
  found.textContent = words.length ? `${shown.size} of ${pictures.length}` : "";
});
