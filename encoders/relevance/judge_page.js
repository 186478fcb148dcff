"use strict";

const element = (id) => document.getElementById(id);
let items = [];
let grades = {};
let scale = [];
let place = 0;

function nextWithoutGrade(from) {
  for (let step = 0; step < items.length; step++) {
    const index = (from + step) % items.length;
    if (grades[items[index].item] === undefined) return index;
  }
  return Math.min(from, items.length - 1);
}

function show() {
  const item = items[place];
  const done = Object.keys(grades).length;
  element("count").textContent = `${done} of ${items.length} graded · item ${place + 1}`;
  element("progress").max = items.length;
  element("progress").value = done;
  element("query").textContent = item.query;
  element("query").lang = item.language || "";
  element("title").textContent = item.title || item.entity_id;
  element("text").textContent = item.text || "";
  const picture = element("picture");
  picture.hidden = !item.picture;
  if (item.picture) picture.src = item.picture;
  else picture.removeAttribute("src");
  scale.forEach((_, grade) => {
    const pressed = grades[item.item] === grade;
    element(`grade${grade}`).setAttribute("aria-pressed", String(pressed));
  });
}

function move(to) {
  place = Math.max(0, Math.min(items.length - 1, to));
  show();
}

async function grade(value) {
  const item = items[place].item;
  const before = grades[item];
  if (value === null) delete grades[item];
  else grades[item] = value;
  if (value === null) show();
  else move(nextWithoutGrade(place));
  try {
    const answer = await fetch("/api/grade", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ item, grade: value }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error);
    element("error").textContent = "";
  } catch (error) {
    if (before === undefined) delete grades[item];
    else grades[item] = before;
    move(items.findIndex((other) => other.item === item));
    element("error").textContent = `This grade is not saved: ${error.message}`;
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const digit = Number.parseInt(event.key, 10);
  if (event.key.length === 1 && digit < scale.length) grade(digit);
  else if (event.key === "ArrowLeft") move(place - 1);
  else if (event.key === "ArrowRight") move(place + 1);
  else if (event.key === "Backspace") grade(null);
  else return;
  event.preventDefault();
}

async function start() {
  const state = await (await fetch("/api/items")).json();
  items = state.items;
  grades = state.grades;
  scale = state.scale;
  element("judge").textContent = `Judge: ${state.judge}`;
  scale.forEach((name, value) => {
    const button = document.createElement("button");
    button.type = "button";
    button.id = `grade${value}`;
    button.textContent = `${value} ${name}`;
    button.addEventListener("click", () => grade(value));
    element("grades").append(button);
  });
  element("picture").addEventListener("error", () => { element("picture").hidden = true; });
  element("next").addEventListener("click", () => move(nextWithoutGrade(place + 1)));
  document.addEventListener("keydown", onKey);
  place = nextWithoutGrade(0);
  show();
}

start().catch((error) => { element("error").textContent = error.message; });
