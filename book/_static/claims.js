// Sorting, filtering and searching of the page of claims. Without it the tables are whole.
document.addEventListener("DOMContentLoaded", () => {
  const tables = [...document.querySelectorAll("table.lablog-claims")];
  if (!tables.length) return;
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);

  const bar = document.createElement("form");
  bar.className = "lablog-claims-bar";
  bar.setAttribute("role", "search");
  bar.addEventListener("submit", (event) => event.preventDefault());
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "search claims";
  search.setAttribute("aria-label", "search claims");
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "verdict");
  const verdicts = [...new Set(rows.map((row) => row.dataset.verdict))].sort();
  for (const verdict of ["all verdicts", ...verdicts]) choice.add(new Option(verdict));
  const shown = document.createElement("output");
  bar.append(search, choice, shown);
  tables[0].closest("section").before(bar);

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = (choice.selectedIndex === 0 || row.dataset.verdict === choice.value)
        && words.every((word) => text.includes(word));
      row.hidden = !fits;
      count += fits;
    }
    shown.value = `${count} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  choice.addEventListener("change", filter);
  filter();

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[column].textContent.trim();
        const sorted = [...table.tBodies[0].rows].sort(
          (a, b) => key(a).localeCompare(key(b), "en", { numeric: true }) * (down ? -1 : 1));
        table.tBodies[0].append(...sorted);
      });
    });
  }
});
