// Compare: pictures that arrive go to their places, two that are picked meet, a slider moves between them.
window.daCompare = {
  place(element) {
    for (const fresh of element.querySelectorAll("[data-for]")) {
      document.getElementById(fresh.dataset.for)?.replaceChildren(...fresh.childNodes);
    }
  },
  choose(grid, event, chosen) {
    const pick = event.target.closest(".da-cmp-pick");
    if (!pick) return;
    const before = [...grid.querySelectorAll(".da-cmp-picked")];
    pick.classList.toggle("da-cmp-picked");
    if (!pick.classList.contains("da-cmp-picked")) return;
    if (before.length > 1) before.forEach(other => other.classList.remove("da-cmp-picked"));
    const cells = [...grid.querySelectorAll(".da-cmp-picked")].map(each => each.dataset.cell);
    if (cells.length === 2) chosen(cells);
  },
  show(id) {
    document.getElementById(id)?.scrollIntoView({ behavior: "smooth", block: "nearest" });
  },
  press(id) {
    const place = document.getElementById(id);
    (place?.matches("a, button") ? place : place?.querySelector("a, button"))?.click();
  },
  link(query) {
    const link = `${location.origin}${location.pathname}?tab=compare&${query}`;
    navigator.clipboard?.writeText(link).catch(() => undefined);  // the box below shows it in any case
    return link;
  },
};
document.addEventListener("input", event => {
  if (event.target.matches(".da-cmp-slide input")) {
    event.target.parentElement.style.setProperty("--da-cmp-at", `${event.target.value}%`);
  }
});
