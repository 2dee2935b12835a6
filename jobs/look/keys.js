// Keys: j k Enter x on cards, u back, / find, ? what they do. Reading works without this script.
"use strict";

const cards = () => [...document.querySelectorAll(".card, .thumb a")];

function step(by) {
  const all = cards();
  if (!all.length) return;
  const at = all.indexOf(document.activeElement);
  const next = all[Math.min(Math.max(at < 0 ? 0 : at + by, 0), all.length - 1)];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

function open() {
  const card = document.activeElement.closest(".card");
  if (card) card.querySelector("a.open").click();
}

function mark() {
  const card = document.activeElement.closest(".card");
  const form = card && card.querySelector("form.marking");
  if (form) form.submit();
}

// After a mark the page is loaded anew, at the card that was marked.
const marked = location.hash && document.getElementById(location.hash.slice(1));
if (marked) marked.focus();

function page(rel) {
  const link = document.querySelector(`a[rel="${rel}"]`);
  if (link) link.click();
}

const keys = {
  j: () => step(1),
  k: () => step(-1),
  x: mark,
  n: () => page("next"),
  p: () => page("prev"),
  u: () => history.back(),
  "/": () => document.getElementById("search").focus(),
  "?": () => document.querySelector(".keys").classList.toggle("shown"),
};

// The slider says its value while it moves, and shows what it means where it stops.
const slider = document.getElementById("min_score");
if (slider) {
  slider.addEventListener("input", () => { document.getElementById("of-min_score").value = slider.value; });
  slider.addEventListener("change", () => slider.form.submit());
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea, button, summary")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "Enter") return open();
  const act = keys[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
