"use strict";
for (const svg of document.querySelectorAll("svg.chart:not(.plane)")) {
  const { left, right, low, high, log, width, height } = Object.fromEntries(
    Object.entries(svg.dataset).map(([key, value]) => [key, Number(value)]));
  const cursor = svg.querySelector(".cursor"), lines = [...svg.querySelectorAll("polyline")];
  const readout = svg.parentNode.appendChild(document.createElement("p"));
  readout.className = "note readout";
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const wanted = (event.clientX - box.left) * view.width / box.width + view.x;
    const nearest = new Map();
    for (const line of lines) for (const point of line.points) {
      const found = nearest.get(line.dataset.name);
      if (!found || Math.abs(point.x - wanted) < Math.abs(found.x - wanted)) nearest.set(line.dataset.name, point);
    }
    const words = [...nearest].map(([name, point]) => {
      const part = 1 - point.y / height;
      const value = log ? low * (high / low) ** part : low + (high - low) * part;
      const step = Math.round(left + (right - left) * point.x / width);
      cursor.setAttribute("d", `M${point.x} 0V${height}`);
      return `${name}: ${Number(value.toPrecision(4))} at step ${step.toLocaleString("en")}`;
    });
    readout.textContent = words.join(", ");
  });
}
for (const part of document.querySelectorAll(".timeline")) {
  const figures = [...part.querySelectorAll("figure")];
  const steps = [...new Set(figures.map((figure) => Number(figure.dataset.step)))].sort((a, b) => a - b);
  if (steps.length < 2) continue;
  const control = document.createElement("p"), slider = document.createElement("input");
  const label = document.createElement("span"), all = document.createElement("label");
  const box = document.createElement("input");
  control.className = "control";
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1 });
  slider.setAttribute("aria-label", "step of the previews");
  box.type = "checkbox";
  all.append(box, " all steps");
  control.append(slider, label, all);
  part.prepend(control);
  const show = () => {
    label.textContent = `step ${steps[slider.value].toLocaleString("en")}`;
    slider.disabled = box.checked;
    for (const figure of figures) figure.hidden = !box.checked && Number(figure.dataset.step) !== steps[slider.value];
  };
  slider.addEventListener("input", show);
  box.addEventListener("input", show);
  show();
}
for (const part of document.querySelectorAll(".front")) {
  const beside = part.querySelector(".beside"), points = [...part.querySelectorAll(".point")];
  const show = (point) => {
    const card = part.querySelector(`.checkpoint[data-step="${point.dataset.step}"] .pictures`);
    const words = document.createElement("p");
    words.textContent = point.querySelector("title").textContent;
    beside.replaceChildren(words, ...(card ? [card.cloneNode(true)] : []));
    for (const each of points) each.classList.toggle("chosen", each.dataset.step === point.dataset.step);
  };
  for (const point of points) {
    for (const event of ["pointerenter", "click", "focus"]) point.addEventListener(event, () => show(point));
  }
}
