"use strict";
// The slider over the samples. Which of them is looked at outlives the reloading of the page; the last one is followed.
const slider = document.querySelector(".slider input"), frames = [...document.querySelectorAll(".frame")];
function remembered(value) {
  try {
    const key = "step of " + document.title;
    if (value !== undefined) sessionStorage.setItem(key, value);
    return sessionStorage.getItem(key);
  } catch { return null; }
}
function show(index) {
  frames.forEach((frame, i) => { frame.hidden = i !== index; });
  document.querySelector(".slider output").textContent = "step " + frames[index].dataset.step;
}
if (slider) {
  const before = frames.findIndex(frame => frame.dataset.step === remembered());
  slider.value = before < 0 ? frames.length - 1 : before;
  show(Number(slider.value));
  slider.addEventListener("input", () => {
    const index = Number(slider.value);
    show(index);
    remembered(index === frames.length - 1 ? "" : frames[index].dataset.step);
  });
}
// Values of the curves under the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const [left, right, top_, bottom, xLow, xHigh, yLow, yHigh, isLog] = chart.dataset.axes.split(" ").map(Number);
  const label = chart.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "text"));
  label.setAttribute("class", "value");
  const lines = [...chart.querySelectorAll("polyline:not(.faint)")].map(line => [line.dataset.name, [...line.points]]);
  chart.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const x = Math.min(right, Math.max(left, at.x)), parts = [];
    for (const [name, points] of lines) {
      const point = points.reduce((best, each) => Math.abs(each.x - x) < Math.abs(best.x - x) ? each : best);
      const share = (bottom - point.y) / (bottom - top_);
      const value = isLog ? yLow * Math.pow(yHigh / yLow, share) : yLow + share * (yHigh - yLow);
      parts.push((lines.length > 1 ? name + " " : "") + value.toPrecision(4));
    }
    const place = xLow + (x - left) / (right - left) * (xHigh - xLow);
    label.textContent = Number(place.toPrecision(4)) + ": " + parts.join(", ");
    label.setAttribute("x", x);
    label.setAttribute("y", top_ + 12);
    label.setAttribute("text-anchor", x > (left + right) / 2 ? "end" : "start");
  });
  chart.addEventListener("pointerleave", () => { label.textContent = ""; });
}
// Local time, and a word if a page that should be written again has not been for long.
const written = document.querySelector("time");
const age = (Date.now() - Date.parse(written.dateTime)) / 60000;
written.textContent = new Date(written.dateTime).toLocaleString();
if (document.querySelector(".running") && age > 10) {
  const stale = document.querySelector(".stale");
  stale.textContent = "Nothing was written for " + Math.round(age) + " minutes: the run may have been killed.";
  stale.hidden = false;
}
