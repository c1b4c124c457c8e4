// Browse: reports which button of which record was pressed; captions are edited where they stand.
window.daBrowse = {
  editor() {
    const made = () => [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0")).join("");
    const kept = localStorage.getItem("da-browse-editor") || made();
    localStorage.setItem("da-browse-editor", kept);
    return kept;
  },
  attach(element, trigger) {
    element.addEventListener("click", event => {
      const button = event.target.closest("button[data-kind]");
      const text = event.target.closest(".da-browse-text");
      if (text && !text.isContentEditable) text.classList.toggle("da-browse-open");
      if (!button || button.disabled) return;
      const { kind, row, page } = button.dataset;
      if (kind === "fix") this.fix(button);
      else if (kind === "keep") this.keep(button, trigger);
      else if (kind === "leave") this.leave(button.closest(".da-browse-card"));
      else trigger("click", { kind, row: Number(row ?? -1), page: Number(page ?? -1) });
    });
    element.addEventListener("change", event => {
      if (event.target.type === "number") trigger("click", { kind: "go", row: -1, page: Number(event.target.value) - 1 });
    });
    element.addEventListener("keydown", event => {
      if (!event.target.isContentEditable) return;
      const card = event.target.closest(".da-browse-card");
      if (event.key === "Enter") { event.preventDefault(); this.keep(card.querySelector("[data-kind=keep]"), trigger); }
      if (event.key === "Escape") this.leave(card);
    });
  },
  fix(button) {
    const card = button.closest(".da-browse-card");
    const texts = [...card.querySelectorAll(".da-browse-text[data-image]")];
    if (!texts.length) return;
    for (const text of texts) {
      text.contentEditable = "plaintext-only";
      text.classList.add("da-browse-open");
      text.dataset.was = text.textContent;
    }
    card.querySelector(".da-browse-buttons").dataset.was = card.querySelector(".da-browse-buttons").innerHTML;
    card.querySelector(".da-browse-buttons").innerHTML =
      '<button type="button" class="da-browse-button da-browse-main" data-kind="keep">Keep</button>' +
      '<button type="button" class="da-browse-button" data-kind="leave">Leave as it was</button>';
    texts[0].focus();
    getSelection().selectAllChildren(texts[0]);
  },
  keep(button, trigger) {
    const card = button.closest(".da-browse-card");
    const changed = [...card.querySelectorAll(".da-browse-text[data-image]")].filter(text => text.textContent !== text.dataset.was);
    const texts = changed.map(text => [text.dataset.image === "" ? null : Number(text.dataset.image), text.textContent]);
    this.leave(card);
    if (texts.length) trigger("click", { kind: "caption", row: Number(card.dataset.row), page: -1, texts });
  },
  leave(card) {
    for (const text of card.querySelectorAll(".da-browse-text[data-image]")) {
      text.textContent = text.dataset.was;
      text.contentEditable = "false";
      text.classList.remove("da-browse-open");
    }
    const buttons = card.querySelector(".da-browse-buttons");
    buttons.innerHTML = buttons.dataset.was;
  },
  top(id) {
    const place = document.getElementById(id);
    if (place && place.getBoundingClientRect().top < 0) place.scrollIntoView();
  },
};
