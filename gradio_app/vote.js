// Vote: one ballot at a time. A vote is sent with the ballot that is on the page, so that nothing is voted on twice.
window.daVote = {
  isReady: false,
  isBusy: false,
  picked: [],
  ready() { this.isReady = true; },
  idle() {
    this.isBusy = false;
    this.element?.classList.remove("da-vote-busy");
  },
  name(given) {
    const kept = localStorage.getItem("da-vote-name");
    const name = given?.trim() || kept || `anonymous-${Math.random().toString(16).slice(2, 8).padEnd(6, "0")}`;
    localStorage.setItem("da-vote-name", name);
    return name;
  },
  attach(element, trigger, watch) {
    this.element = element;
    this.trigger = trigger;
    element.addEventListener("click", event => {
      const pick = event.target.closest(".da-vote-pick");
      const button = event.target.closest("[data-did]");
      if (pick) this.pick(Number(pick.dataset.place));
      if (pick && event.detail > 0) pick.blur();  // after the mouse, Enter submits
      if (button && !button.disabled) this.act(button.dataset.did);
    });
    element.addEventListener("change", event => event.target.blur());  // keys vote again after a radio was clicked
    watch("value", () => this.changed());
    setInterval(() => this.poll(), 400);
  },
  async changed() {
    // Gradio keeps elements where it can: a choice of before is no choice now, and an old picture must not stand under
    // a new prompt until the new one is decoded.
    this.picked = [];
    this.element.classList.add("da-vote-loading");
    for (const input of this.element.querySelectorAll("input:checked")) input.checked = false;
    await new Promise(requestAnimationFrame);
    const images = [...this.element.querySelectorAll("img")];
    await Promise.all(images.map(image => image.decode().catch(() => undefined)));
    if (this.ballot?.dataset.size > 2) this.draw();
    this.element.classList.remove("da-vote-loading");
    this.idle();
  },
  get ballot() { return this.element?.querySelector(".da-vote"); },
  get isShown() { return Boolean(this.element?.isConnected && this.element.offsetParent); },
  poll() {
    const state = this.ballot?.dataset.state;
    if (!this.isReady || this.isBusy || !this.isShown || document.hidden) return;
    if (state === "start" || (state === "wait" && Date.now() - (this.asked ?? 0) > 1500)) this.send({ kind: "next" });
  },
  send(message) {
    if (this.isBusy || this.element.classList.contains("da-vote-loading")) return;
    this.isBusy = true;
    this.asked = Date.now();
    this.element.classList.add("da-vote-busy");
    this.trigger("click", message);
  },
  pick(place) {
    if (this.isBusy) return;
    const at = this.picked.indexOf(place);
    if (at < 0) this.picked.push(place);
    else if (at === this.picked.length - 1) this.picked.pop();
    this.draw();
  },
  draw() {
    for (const pick of this.element.querySelectorAll(".da-vote-pick")) {
      const rank = this.picked.indexOf(Number(pick.dataset.place));
      pick.classList.toggle("da-vote-picked", rank >= 0);
      pick.querySelector(".da-vote-rank").textContent = rank >= 0 ? rank + 1 : "";
    }
    const size = Number(this.ballot.dataset.size);
    this.element.querySelector("#da-vote-submit")?.classList.toggle("da-vote-ready", this.picked.length >= size - 1);
  },
  act(did) {
    const { ballot, size, last, state } = this.ballot?.dataset ?? {};
    if (did === "undo") return void (last && this.send({ kind: "undo", ballot: last }));
    if (state !== "vote") return;
    const all = Array.from({ length: Number(size) }, (_, place) => place);
    if (did === "unpick") { this.picked.pop(); return this.draw(); }
    let ranks = all.map(() => 0);
    if (did === "left" || did === "right") ranks = did === "left" ? [0, 1] : [1, 0];
    if (did === "submit") {
      if (this.picked.length < all.length - 1) return;  // the last place is the one that is left
      ranks = all.map(place => (this.picked.includes(place) ? this.picked.indexOf(place) : all.length - 1));
    }
    const said = { overall: { ranks, is_bad: did === "bad" } };
    for (const group of this.element.querySelectorAll(".da-vote-aspect")) {
      const best = group.querySelector("input:checked")?.value;
      if (best !== undefined) {
        const of = all.map(place => (best === "tie" || Number(best) === place ? 0 : 1));
        said[group.dataset.aspect] = { ranks: of, is_bad: false };
      }
    }
    this.send({ kind: "cast", ballot, said });
  },
  keys: {
    2: { 1: "left", ArrowLeft: "left", 0: "tie", ArrowDown: "tie", 2: "right", ArrowRight: "right", x: "bad" },
    more: { 0: "tie", x: "bad", Enter: "submit", Backspace: "unpick" },
  },
  key(event) {
    const at = event.target;
    if (!this.isShown || event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.defaultPrevented) return;
    if (at.closest?.("input, textarea, select, [contenteditable=true], [role=listbox], [role=dialog]")) return;
    if (event.key === "Enter" && at.closest?.("button, a")) return;
    const size = Number(this.ballot?.dataset.size ?? 0);
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const did = key === "u" ? "undo" : (size === 2 ? this.keys[2] : this.keys.more)[key];
    const place = Number(key) - 1;
    if (did) this.act(did);
    else if (size > 2 && place >= 0 && place < size) this.pick(place);
    else return;
    event.preventDefault();
  },
};
document.addEventListener("keydown", event => window.daVote.key(event));
