// A click on a heading sorts its table; a second click turns the order round.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.querySelectorAll("th")];
  headings.forEach((heading, column) => heading.querySelector("button")?.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const figures = heading.classList.contains("figure");
    const value = (row) => row.cells[column].dataset.value;
    // What has no figure stays at the end, in either order.
    const missing = (row) => figures && (value(row) === "" || Number.isNaN(Number(value(row))));
    const compare = (a, b) => figures
      ? Number(value(a)) - Number(value(b))
      : value(a).localeCompare(value(b), undefined, { numeric: true });
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => missing(a) - missing(b) || (up ? compare(a, b) : compare(b, a)));
    body.append(...rows);
  }));
}
