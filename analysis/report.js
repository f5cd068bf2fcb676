// Sorting: a heading's button sorts its table, numbers as numbers; gaps stay last in both directions.
const key = (row, i) => {
  const cell = row.cells[i], raw = cell.dataset.v ?? cell.textContent.trim();
  if (raw === "" || raw === "–") return null;
  return isNaN(raw) ? raw : Number(raw);
};
const order = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
for (const button of document.querySelectorAll(".sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], i = head.cellIndex;
    const first = head.classList.contains("n") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    for (const th of head.parentNode.cells) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way);
    const keyed = [...body.rows].map((row) => [key(row, i), row]);
    keyed.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : (way === "ascending" ? 1 : -1) * order(a, b));
    body.append(...keyed.map(([, row]) => row));
  });
}
// Filtering: rows that hold every word stay.
for (const filter of document.querySelectorAll(".filter")) {
  const rows = [...filter.nextElementSibling.querySelector("tbody").rows];
  filter.querySelector("input").addEventListener("input", ({ target }) => {
    const words = target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    filter.querySelector("output").textContent = words.length
      ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(code);  // not every browser lends the clipboard to a local file
    }
  });
}
// The list of sections marks the one that is being read.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-15% 0px -80% 0px" });
document.querySelectorAll("main > section").forEach((section) => seen.observe(section));
// Recipes: a click on a point keeps the lines that cross its axis there (heights are from 0 to 1).
const recipes = document.getElementById("plot-recipes");
if (recipes) {
  const kept = new Map(), near = (a, b) => Math.abs(a - b) < 0.04;
  const lines = recipes.data.flatMap(({ mode }, i) => (mode === "lines+markers" ? [i] : []));
  recipes.on("plotly_click", ({ points: [{ x, y }] }) => {
    if (kept.has(x) && near(kept.get(x), y)) kept.delete(x); else kept.set(x, y);
    const shown = lines.map((i) => [...kept].every(([axis, height]) => near(recipes.data[i].y[axis], height)));
    Plotly.restyle(recipes, { opacity: shown.map((yes) => (yes ? 1 : 0.08)) }, lines);
  });
}
// Paper has its own width, and browsers do not tell charts: set it before printing, give it back after.
const charts = () => document.querySelectorAll(".js-plotly-plot");
addEventListener("beforeprint", () => charts().forEach((chart) => Plotly.relayout(chart, { width: 660, height: 400 })));
addEventListener("afterprint", () =>
  charts().forEach((chart) => Plotly.relayout(chart, { width: null, height: null, autosize: true })));
