// Draws an explorer: controls for what the reader chooses, and views of what Python computed for it.
// Nothing is computed here. All text comes from data and is set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child != null));
  return node;
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// Items: an image with its title, or the title alone

function picture(item) {
  if (item.image) return make("img", { src: item.image, alt: "", class: "picture" });
  return make("span", { class: "picture tile", "aria-hidden": "true" }, item.title.slice(0, 2));
}

function card(item, note) {
  return [picture(item), make("span", { class: "title", title: item.title }, item.title),
          note ? make("span", { class: "note" }, note) : null].filter(Boolean);
}

// Controls: each returns its node and a function that shows a value

const CONTROLS = {
  select(control, send) {
    const options = control.options.map(([, label]) => make("option", {}, label));
    const node = make("select", { "aria-label": control.label, change: () => send(control.options[node.selectedIndex][0]) }, ...options);
    const show = value => { node.selectedIndex = control.options.findIndex(option => same(option[0], value)); };
    return { node: make("label", { class: "control" }, make("span", {}, control.label), node), show };
  },

  range(control, send) {
    let later;
    const shown = make("span", {}), { min, max, step } = control;
    const tell = () => { shown.textContent = `${node.value}${control.unit}`; };
    const node = make("input", { "aria-label": control.label, type: "range", min, max, step, input: () => {
      tell();
      clearTimeout(later);
      later = setTimeout(() => send(Number(node.value)), 60);
    } });
    const show = value => { node.value = value; tell(); };
    const label = make("span", {}, control.label, ": ", shown);
    return { node: make("label", { class: "control" }, label, node), show };
  },

  checks(control, send, items) {
    const boxes = control.options.map(row => make("input", { type: "checkbox", change: () =>
      send(boxes.flatMap((box, index) => box.checked ? [index] : [])) }));
    const list = control.options.map((row, index) =>
      make("li", {}, make("label", {}, boxes[index], ...card(items[row]))));
    const show = value => boxes.forEach((box, index) => { box.checked = value.includes(index); });
    const node = make("fieldset", { class: "control wide" }, make("legend", {}, control.label),
                      make("ul", { class: "cards" }, ...list));
    return { node, show };
  },

  text(control, send) {
    const node = make("input", { "aria-label": control.label, type: "text", maxlength: 300, change: () => send(node.value) });
    const show = value => { if (node !== document.activeElement) node.value = value; };
    return { node: make("label", { class: "control wide" }, make("span", {}, control.label), node), show };
  },

  add(control, send) {
    let added = [];
    const names = make("datalist", { id: `mmx-${Math.random().toString(36).slice(2)}` },
                       ...control.options.map(([, label]) => make("option", { value: label })));
    const push = () => {
      const found = control.options.find(([, label]) => label === node.value);
      if (found) send([...added, found[0]]);
      if (found) node.value = "";
    };
    const node = make("input", { "aria-label": control.label, type: "text", list: names.id, keydown: event => { if (event.key === "Enter") push(); } });
    const undo = make("button", { type: "button", click: () => send(added.slice(0, -1)) }, "Take back");
    const show = value => { added = value; undo.disabled = !value.length; };
    const buttons = [make("button", { type: "button", click: push }, "Add"), undo];
    const label = make("label", {}, make("span", {}, control.label), node);
    return { node: make("div", { class: "control wide" }, label, names, ...buttons), show };
  },
};

// Views

const VIEWS = {
  note: view => make("p", { class: "text" }, view.text),

  cards: (view, items) => make("ul", { class: "cards" }, ...view.rows.map((row, index) =>
    make("li", {}, ...card(items[row], view.notes?.[index])))),

  bars: (view, items) => make("ol", { class: "bars" }, ...view.bars.map(bar => {
    const fill = make("span", { class: "fill" });
    fill.style.width = `${100 * Math.min(1, Math.max(0, bar.value / view.max))}%`;
    fill.style.background = `var(--mmx-c-${bar.color})`;
    const label = bar.label ?? items[bar.rows[0]].title;
    return make("li", {}, make("span", { class: "pictures" }, ...(bar.rows ?? []).map(row => picture(items[row]))),
                make("span", { class: "label", title: label }, label), make("span", { class: "track" }, fill),
                make("span", { class: "value" }, bar.text, bar.note ? make("small", {}, bar.note) : null));
  })),

  grid(view, items) {
    const head = rows => make("span", { class: "pictures", title: items[rows[0]].title }, ...rows.map(row => picture(items[row])));
    const most = Math.max(...view.values.flat(), 1e-9);
    const cell = value => {
      const node = make("td", { class: value > .6 * most ? "strong" : "" }, value.toFixed(2).replace(/^0/, ""));
      node.style.setProperty("--part", `${Math.round(92 * value / most)}%`);
      return node;
    };
    const columns = view.columns.map((rows, index) => make("th", { scope: "col" }, head(rows), make("small", {}, view.column_names[index])));
    const lines = view.rows.map((row, index) => make("tr", {}, make("th", { scope: "row" }, ...card(items[row])),
                                                     ...view.values[index].map(cell)));
    const table = make("table", { class: "grid" }, make("thead", {}, make("tr", {}, make("td", {}), ...columns)), make("tbody", {}, ...lines));
    return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": view.title }, table);
  },

  streams: (view, items) => make("table", { class: "streams" },
    make("thead", {}, make("tr", {}, ...["position", ...view.names].map(name => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...view.rows.map((row, index) => {
      const text = () => make("td", { class: "text-side" }, make("span", { class: "title" }, items[row].title));
      const image = () => make("td", { class: "image-side" }, picture(items[row]), make("span", { class: "sr" }, `image of ${items[row].title}`));
      const order = view.swapped[index] ? [image, text] : [text, image];
      return make("tr", {}, make("th", { scope: "row" }, `${index + 1}${view.swapped[index] ? " ⇄" : ""}`), ...order.map(side => side()));
    }))),

  strip(view) {
    const x = rank => 12 + 476 * Math.log(rank) / Math.log(view.most), low = 118, piles = {};
    for (const rank of view.ranks) (piles[Math.round(x(rank) / 7)] ??= []).push(rank);
    const step = Math.min(5.2, 98 / Math.max(...Object.values(piles).map(pile => pile.length)));
    const dots = Object.entries(piles).flatMap(([at, pile]) => pile.sort((a, b) => a - b).map((rank, index) => make("svg:circle",
      { cx: at * 7, cy: low - 4 - step * index, r: 2.4, class: rank <= view.k ? "hit" : "miss" })));
    const ticks = view.ticks.map(tick => make("svg:text", { x: x(tick), y: low + 15, "text-anchor": tick === view.most ? "end" : "middle" }, String(tick)));
    const limit = Math.min(x(view.k + .5), 496), side = limit > 400 ? "end" : "start";
    return make("svg:svg", { viewBox: "0 0 500 136", role: "img", "aria-label": view.label, class: "strip" },
      make("svg:line", { x1: 4, x2: 496, y1: low, y2: low, class: "axis" }), ...dots, ...ticks,
      make("svg:line", { x1: limit, x2: limit, y1: 4, y2: low, class: "limit" }),
      make("svg:text", { x: limit + (side === "end" ? -4 : 4), y: 12, "text-anchor": side, class: "limit-name" }, `k = ${view.k}`));
  },

  points(view, items) {
    const [wide, high] = [500, 380], about = make("output", { class: "about" });
    let at = 0;
    const spots = view.rows.map((row, index) => make("svg:circle", {
      cx: 10 + view.x[index] * (wide - 20), cy: 10 + (1 - view.y[index]) * (high - 20), r: 5, "data-row": row,
      style: `fill: var(--mmx-group-${view.groups[index]})`, pointerenter: () => show(index), click: () => show(index) }));
    const ring = make("svg:circle", { r: 9, class: "ring" }), links = make("svg:g", { class: "links" });
    const place = spot => [spot.cx.baseVal.value, spot.cy.baseVal.value];
    const show = index => {
      at = index;
      const [cx, cy] = place(spots[at]);
      ring.setAttribute("cx", cx);
      ring.setAttribute("cy", cy);
      links.replaceChildren(...view.near[at].map(other => {
        const [x2, y2] = place(spots[other]);
        return make("svg:line", { x1: cx, y1: cy, x2, y2 });
      }));
      const group = view.group_names[view.groups[at]];
      about.replaceChildren(make("span", { class: "main" }, ...card(items[view.rows[at]], group)), make("span", { class: "text" }, view.near_title),
        make("span", { class: "cards" }, ...view.near[at].map(other => make("span", { class: "item" }, ...card(items[view.rows[other]])))));
    };
    const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    const move = event => {
      const way = ways[event.key];
      if (!way) return;
      event.preventDefault();
      const [cx, cy] = place(spots[at]);
      let best = null, least = Infinity;
      spots.forEach((spot, index) => {
        const [dx, dy] = [place(spot)[0] - cx, place(spot)[1] - cy];
        const along = dx * way[0] + dy * way[1], across = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
        if (along > 0 && along >= across && along + 2 * across < least) [best, least] = [index, along + 2 * across];
      });
      if (best != null) show(best);
    };
    const map = make("svg:svg", { viewBox: `0 0 ${wide} ${high}`, tabindex: 0, role: "application", keydown: move, class: "map",
                                  "aria-label": `${view.title}. Arrow keys go from item to item.` }, links, ...spots, ring);
    const names = view.group_names.map((name, index) => {
      const dot = make("span", { class: "dot" });
      dot.style.background = `var(--mmx-group-${index})`;
      return make("li", {}, dot, name);
    });
    show(0);
    return make("div", { class: "mapped" }, make("div", {}, map, make("ul", { class: "legend" }, ...names)), about);
  },
};

// The whole

function render({ model, el }) {
  const fixed = model.get("fixed"), kept = new Map();
  const form = make("div", { class: "controls" }), views = make("div", { class: "views" });
  const status = make("p", { class: "status", role: "status" });
  const root = make("section", { class: "mmx", "aria-label": fixed.title },
                    make("h2", {}, fixed.title), make("p", { class: "text" }, fixed.about), form, status, views);
  Object.entries(fixed.colors).forEach(([name, color]) => root.style.setProperty(`--mmx-c-${name}`, color));

  const send = (control, value) => {
    const choice = Object.fromEntries(model.get("scene").controls.map(other => [other.name, other.value]));
    choice[control.name] = value;
    control.resets.forEach(name => delete choice[name]);
    model.set("choice", choice);
    model.save_changes();
  };

  const draw = () => {
    const scene = model.get("scene"), items = { ...fixed.items, ...scene.items };
    const nodes = scene.controls.map(control => {
      const { value, ...spec } = control, was = kept.get(control.name);
      const is = same(was?.spec, spec) ? was : { spec, ...CONTROLS[control.kind](control, value => send(control, value), items) };
      kept.set(control.name, is);
      is.show(value);
      return is.node;
    });
    nodes.forEach((node, index) => {  // what stays is not moved: it may have the focus
      const there = form.children[index];
      if (there !== node) there ? there.replaceWith(node) : form.append(node);
    });
    while (form.children.length > nodes.length) form.lastChild.remove();
    status.textContent = scene.error || scene.status;
    status.classList.toggle("error", Boolean(scene.error));
    views.replaceChildren(...scene.views.map(view => make("section", { class: `view view-${view.view}` },
      view.title ? make("h3", {}, view.title) : null, VIEWS[view.view](view, items))));
  };

  model.on("change:scene", draw);
  draw();
  el.append(root);
  return () => model.off("change:scene", draw);
}

export default { render };
