"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const filtered = all("[data-kinds]").map((element) => ({
    element,
    kinds: element.dataset.kinds.split(" "),
    traits: element.dataset.traits.split(" "),
    words: element.dataset.words,
  }));
  const tables = all("table.sortable").map((table) => ({
    table,
    heads: all("th", table),
    initial: all("th", table).map((head) => head.getAttribute("aria-sort")),
    rows: [...table.tBodies[0].rows],
    nothing: table.parentElement.nextElementSibling,
  }));
  const buttons = all("[data-trait]");
  const bar = byId("controls"); // the pages of mechanisms have none
  let state = empty();

  function empty() {
    return { kind: "", traits: new Map(), query: "", sorts: new Map(), at: "" };
  }

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  // A plus in an address is a plus: specifications are full of them.
  function read() {
    const found = empty();
    const hash = location.hash.slice(1);
    if (!hash.includes("=")) {
      found.at = decoded(hash);
      return found;
    }
    for (const pair of hash.split("&")) {
      const cut = pair.indexOf("=");
      const name = pair.slice(0, cut);
      const value = pair.slice(cut + 1);
      if (name === "kind") found.kind = decoded(value);
      if (name === "q") found.query = decoded(value);
      if (name === "at") found.at = decoded(value);
      for (const item of name === "trait" ? value.split(",") : []) {
        const trait = decoded(item);
        const known = trait.replace(/^no-/, "");
        if (buttons.some((button) => button.dataset.trait === known)) {
          found.traits.set(known, !trait.startsWith("no-"));
        }
      }
      for (const item of name === "sort" ? value.split(",") : []) {
        const [table, key, way] = item.split(":").map(decoded);
        if (table && key) found.sorts.set(table, [key, way === "down" ? "down" : "up"]);
      }
    }
    return found;
  }

  function address() {
    const list = (items) => items.map((item) => item.map(encodeURIComponent).join(":")).join(",");
    const pairs = [
      ["kind", encodeURIComponent(state.kind)],
      ["trait", list([...state.traits].map(([name, held]) => [(held ? "" : "no-") + name]))],
      ["q", encodeURIComponent(state.query)],
      ["sort", list([...state.sorts].map(([table, [key, way]]) => [table, key, way]))],
      ["at", encodeURIComponent(state.at)],
    ];
    return "#" + pairs.filter((pair) => pair[1]).map((pair) => pair.join("=")).join("&");
  }

  function filter() {
    const wanted = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const seen = { rows: [0, 0], mechanisms: [0, 0] };
    for (const { element, kinds, traits, words } of filtered) {
      const matches =
        (!state.kind || kinds.includes(state.kind)) &&
        [...state.traits].every(([name, held]) => traits.includes(name) === held) &&
        wanted.every((word) => words.includes(word));
      // What a link points to is shown whatever the filters say.
      element.hidden = !matches && !(state.at && element.id === state.at);
      element.classList.toggle("chosen", Boolean(state.at) && element.id === state.at);
      const count = seen[element.closest("#t-mechanisms") ? "mechanisms" : "rows"];
      count[0] += !element.hidden;
      count[1] += 1;
    }
    for (const { rows, nothing } of tables) {
      if (nothing && nothing.classList.contains("nothing")) {
        nothing.hidden = rows.some((row) => !row.hidden);
      }
    }
    const [rows, mechanisms] = [seen.rows, seen.mechanisms].map((pair) => pair.join(" of "));
    if (bar) byId("count").textContent = `${rows} rows, ${mechanisms} mechanisms`;
  }

  function keyOf(row, index, number) {
    const cell = row.cells[index];
    const value = cell.dataset.value;
    if (number) return value === undefined ? NaN : Number(value);
    return (value === undefined ? cell.textContent : value).trim().toLowerCase();
  }

  function sort() {
    for (const { table, heads, initial, rows } of tables) {
      const [key, way] = state.sorts.get(table.id) || [];
      const index = heads.findIndex((head) => head.dataset.key === key);
      let order = rows;
      if (index >= 0) {
        const number = "number" in heads[index].dataset;
        const sign = way === "down" ? -1 : 1;
        const keyed = rows.map((row) => [keyOf(row, index, number), row]);
        // Rows without a figure come last either way, and equal ones keep their order.
        keyed.sort(([a], [b]) => {
          if (number && (isNaN(a) || isNaN(b))) return isNaN(a) - isNaN(b);
          return a < b ? -sign : a > b ? sign : 0;
        });
        order = keyed.map((pair) => pair[1]);
      }
      table.tBodies[0].append(...order);
      heads.forEach((head, i) => {
        const chosen = way === "down" ? "descending" : "ascending";
        head.setAttribute("aria-sort", index < 0 ? initial[i] : i === index ? chosen : "none");
      });
    }
  }

  function controls() {
    if (!bar) return;
    const query = byId("query");
    if (query.value !== state.query) query.value = state.query;
    byId("kind").value = state.kind;
    for (const button of buttons) {
      const held = state.traits.get(button.dataset.trait);
      button.dataset.state = held === undefined ? "any" : held ? "with" : "without";
      button.setAttribute("aria-pressed", held === undefined ? "false" : held ? "true" : "mixed");
      button.title = held === undefined ? "any" : held ? "with it" : "without it";
    }
    byId("traits").querySelector("summary span").textContent =
      state.traits.size ? ` (${state.traits.size})` : "";
  }

  // The bar may take several lines, and what an address points to must not lie under it.
  function measure() {
    const covers = bar && getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
    document.documentElement.style.setProperty("--bar", `${covers}px`);
  }

  function show(scroll) {
    filter();
    sort();
    controls();
    measure();
    const target = scroll && state.at ? byId(state.at) : null;
    if (target) target.scrollIntoView();
  }

  function change() {
    history.replaceState(null, "", address());
    show(false);
  }

  for (const { table, heads } of tables) {
    for (const head of heads) {
      head.querySelector("button").addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const first = "down" in head.dataset ? "down" : "up";
        const way = now === "none" ? first : now === "ascending" ? "down" : "up";
        state.sorts.set(table.id, [head.dataset.key, way]);
        change();
      });
    }
  }
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const name = button.dataset.trait;
      const held = state.traits.get(name);
      if (held === false) state.traits.delete(name);
      else state.traits.set(name, held === undefined);
      change();
    });
  }
  function listen() {
    byId("query").addEventListener("input", (event) => {
      state.query = event.target.value;
      change();
    });
    byId("kind").addEventListener("change", (event) => {
      state.kind = event.target.value;
      change();
    });
    byId("reset").addEventListener("click", () => {
      state = empty();
      change();
    });
    bar.addEventListener("submit", (event) => event.preventDefault());
    bar.hidden = false;
    new ResizeObserver(measure).observe(bar);
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    state.at = decoded(link.getAttribute("href").slice(1));
    history.pushState(null, "", address());
    show(true);
  });
  addEventListener("popstate", () => {
    state = read();
    show(true);
  });

  if (bar) listen();
  state = read();
  show(true);
})();
