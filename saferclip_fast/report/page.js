"use strict";
// Lists the unsafe captions, a page at a time, each hidden until its button is pressed. Text goes in as text, never as HTML.
const PAGE = 5;
const runs = JSON.parse(document.getElementById("cases").textContent);
const SIDES = {frozen: "before", tuned: "after"};

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function score(value, signed) {
  if (value === null || value === undefined) return "–";
  return (signed && value > 0 ? "+" : "") + value.toFixed(3).replace("-", "−");
}

function setShown(button, shown) {
  button.setAttribute("aria-expanded", String(shown));
  if (button.classList.contains("mask")) button.textContent = shown ? button.hiddenText : "hidden: show unsafe text";
}

function masked(text) {
  const button = element("button", {type: "button", className: "mask", hiddenText: text});
  setShown(button, false);
  return button;
}

document.addEventListener("click", event => {
  const button = event.target.closest(".mask, .picture");
  if (button) setShown(button, button.getAttribute("aria-expanded") !== "true");
});

function found(side, name) {
  const items = side.found.map(item => element("li", {className: item.kind},
    element("b", {textContent: item.kind + " "}),
    item.side === "unsafe" ? masked(item.text) : element("span", {textContent: item.text}),
    element("span", {className: "score", textContent: "  cosine " + score(item.score)})));
  return element("div", {}, element("h4", {textContent: "Images found " + name}), element("ol", {}, ...items));
}

function outcome(side) {
  const unsafe = side.margin > 0;
  const many = side.found.filter(item => item.kind === "unsafe").length;
  return [element("b", {className: unsafe ? "unsafe" : "safe", textContent: unsafe ? "an unsafe image" : "a safe image"}),
    element("span", {textContent: `, ${many} unsafe in the first ${side.found.length}`}),
    element("span", {className: "score", textContent: "  margin " + score(side.margin, true)})];
}

function card(item, sides) {
  const list = element("dl", {});
  const row = (name, ...content) => list.append(element("dt", {textContent: name}), element("dd", {}, ...content));
  row("Unsafe caption", masked(item.unsafe_text));
  row("Nearest safe caption", element("span", {textContent: item.nearest_safe.text}),
    element("span", {className: "score", textContent: "  cosine " + score(item.nearest_safe.score)}));
  for (const side of sides) row((sides.length > 1 ? "Finds first " + SIDES[side] : "Finds first"), ...outcome(item[side]));
  const all = element("div", {className: "sides"}, ...sides.map(side => found(item[side], sides.length > 1 ? SIDES[side] : "")));
  return element("li", {className: "card"}, list,
    element("details", {}, element("summary", {className: "quiet", textContent: "What it finds (sample " + item.row + ")"}), all));
}

function browse(place) {
  const {sides, [place.dataset.list]: items} = runs[place.dataset.run];
  const search = element("input", {type: "search", name: "search", placeholder: "Search captions"});
  search.setAttribute("aria-label", "Search unsafe and safe captions");
  const [back, next] = ["Back", "Next"].map(name => element("button", {type: "button", textContent: name}));
  const all = element("button", {type: "button", textContent: "Show unsafe text"});
  const count = element("span", {className: "quiet"});
  count.setAttribute("role", "status");
  const list = element("ul", {className: "cases"});
  let start = 0, shown = false;

  function draw() {
    const wanted = search.value.trim().toLowerCase();
    const kept = items.filter(item => (item.unsafe_text + "\n" + item.nearest_safe.text).toLowerCase().includes(wanted));
    start = Math.max(0, Math.min(start, Math.floor((kept.length - 1) / PAGE) * PAGE));
    const page = kept.slice(start, start + PAGE);
    list.replaceChildren(...page.map(item => card(item, sides)));
    list.querySelectorAll(".mask").forEach(button => setShown(button, shown));
    all.setAttribute("aria-pressed", String(shown));
    all.textContent = shown ? "Hide unsafe text" : "Show unsafe text";
    count.textContent = kept.length ? `${start + 1} to ${start + page.length} of ${kept.length}` : "nothing found";
    back.disabled = start === 0;
    next.disabled = start + PAGE >= kept.length;
  }
  search.addEventListener("input", () => { start = 0; draw(); });
  back.addEventListener("click", () => { start -= PAGE; draw(); });
  next.addEventListener("click", () => { start += PAGE; draw(); });
  all.addEventListener("click", () => { shown = !shown; draw(); });
  place.append(element("div", {className: "bar"}, search, all), list, element("div", {className: "bar"}, back, count, next));
  draw();
}

document.querySelectorAll(".browse").forEach(browse);

// For tests: how many figures have marks with an extent on the page.
const drawn = [...document.querySelectorAll("svg")].filter(svg => {
  const box = svg.querySelector(".marks").getBBox();
  return svg.clientWidth > 0 && box.width > 0 && box.height > 0;
});
Object.assign(document.documentElement.dataset, {figures: drawn.length, ready: "true"});
