"use strict";
const curves = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const field = (id) => document.getElementById(id);

function filter() {
  const runs = new Set(all("input.run:checked").map((box) => box.value));
  for (const curve of all(".curve")) curve.toggleAttribute("hidden", !runs.has(curve.dataset.run));
  if (!field("step")) return;
  const step = field("step").value, outcome = field("outcome").value;
  for (const group of all("article")) {
    let shown = 0;
    for (const member of all(".member", group)) {
      member.hidden = outcome !== "" && member.dataset.outcome !== outcome;
      shown += !member.hidden;
    }
    const wanted = step === "" || group.dataset.step === step;
    group.hidden = !wanted || !shown || !runs.has(group.dataset.run);
  }
  field("trajectories").classList.toggle("advantages", field("colour").value === "advantage");
}

function follow(figure, event) {
  const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect();
  const { left, right } = field("curves").dataset;
  const x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
  const across = Math.min(1, Math.max(0, (x - left) / (right - left)));
  const low = Number(figure.dataset.low), high = Number(figure.dataset.high);
  const at = low + across * (high - low);
  const values = [];
  let nearest = null;
  for (const curve of all(".curve:not([hidden])", figure)) {
    const points = curves[figure.dataset.metric][curve.dataset.run];
    if (!points.length || at > points.at(-1)[0] + 0.02 * (high - low)) continue; // it ended before
    const best = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    nearest = nearest ?? best[0];
    const value = document.createElement("span");
    value.textContent = ` ${Number(best[1].toPrecision(4))}`;
    value.style.color = curve.style.getPropertyValue("--run");
    values.push(value);
  }
  if (nearest === null) return;
  const cursor = figure.querySelector(".cursor");
  const place = Number(left) + ((nearest - low) / (high - low)) * (right - left);
  cursor.setAttribute("x1", place);
  cursor.setAttribute("x2", place);
  cursor.style.visibility = "visible";
  figure.querySelector("output").replaceChildren(`step ${Math.round(nearest)}:`, ...values);
}

for (const figure of all("figure")) {
  figure.addEventListener("pointermove", (event) => follow(figure, event));
  figure.addEventListener("pointerleave", () => {
    figure.querySelector(".cursor").style.visibility = "hidden";
    figure.querySelector("output").textContent = "";
  });
}
for (const control of all("input, select")) control.addEventListener("change", filter);
if (field("step")) field("step").selectedIndex = field("step").options.length - 1; // the last update
filter();
