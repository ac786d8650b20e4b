"use strict";
for (const viewer of document.querySelectorAll(".viewer")) {
  const controls = viewer.querySelector(".controls");
  const slider = controls.querySelector("input");
  const blink = controls.querySelector("[data-blink]");
  let timer = 0;
  controls.hidden = false;
  viewer.querySelector(".scripted").textContent = "; move the line, or let the two blink";
  slider.addEventListener("input", () => viewer.style.setProperty("--cut", slider.value + "%"));
  for (const button of controls.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      viewer.dataset.top = button.dataset.show;
      for (const other of controls.querySelectorAll("[data-show]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
    });
  }
  blink.addEventListener("click", () => {
    const on = !timer;
    clearInterval(timer);
    timer = on ? setInterval(() => viewer.classList.toggle("off"), 700) : 0;
    viewer.classList.toggle("blinking", on);
    viewer.classList.remove("off");
    blink.setAttribute("aria-pressed", String(on));
  });
}
for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
// Folded parts belong on paper too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
