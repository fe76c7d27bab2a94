"use strict";
(function () {
  // Everything that comes from data is set as text, never as markup.
  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // -- charts: the value nearest to the pointer, or stepped through with the arrow keys --
  function chart(plot) {
    const data = JSON.parse(plot.querySelector("script").textContent);
    if (!data.points.length) return;
    const order = data.points.map((_, i) => i);
    if (data.near === "x") order.sort((a, b) => data.points[a][0] - data.points[b][0]);
    const places = data.near === "x" ? [...new Set(order.map((i) => data.points[i][0]))] : null;
    let parts = [], at = -1;

    function clear() { parts.forEach((p) => p.remove()); parts = []; }
    function show(chosen) {
      clear();
      const first = data.points[chosen[0]];
      if (data.near === "x") {
        const cross = make("div", "cross");
        cross.style.left = first[0] / 10 + "%";
        parts.push(cross);
      }
      const tip = make("div", "tip");
      tip.setAttribute("role", "status");
      const labels = new Set(chosen.map((i) => data.points[i][2]));
      if (labels.size === 1) tip.append(make("b", "", first[2]));
      for (const i of chosen) {
        const [x, y, label, series, text] = data.points[i];
        const [name, colour] = data.names[series];
        const spot = make("div", "spot");
        spot.style.left = x / 10 + "%";
        spot.style.top = y / 10 + "%";
        parts.push(spot);
        const line = make("div");
        line.append(make("i", "c" + colour));
        line.append(make("span", "", (data.names.length > 1 && data.near === "x" ? (labels.size > 1 ? name + ", " + label : name) + ": " : "") + text));
        tip.append(line);
      }
      parts.push(tip);
      parts.forEach((p) => plot.append(p));
      const room = plot.clientWidth, width = tip.offsetWidth, x = (first[0] / 1000) * room;
      tip.style.left = Math.max(-44, Math.min(x + (x > room / 2 ? -width - 14 : 14), room - width)) + "px";
      if (data.near === "xy") tip.style.top = Math.max(-8, (first[1] / 1000) * plot.clientHeight - tip.offsetHeight / 2) + "px";
    }
    function pick(number) {
      const count = places ? places.length : order.length;
      at = (number + count) % count;
      show(places ? order.filter((i) => data.points[i][0] === places[at]) : [order[at]]);
    }
    plot.addEventListener("pointermove", near);
    plot.addEventListener("pointerdown", near);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) clear(); });
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (event.key === "Escape") clear();
      if (!move) return;
      event.preventDefault();
      pick(at < 0 && move < 0 ? -1 : at + move);
    });
    function near(event) {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * 1000, y = ((event.clientY - box.top) / box.height) * 1000;
      let best = 0, least = Infinity;
      const candidates = places || order.map((i) => data.points[i]);
      candidates.forEach((c, i) => {
        const gap = places ? Math.abs(c - x) : Math.hypot(((c[0] - x) * box.width) / box.height, c[1] - y);
        if (gap < least) { least = gap; best = i; }
      });
      pick(best);
    }
  }

  // -- texts: what both models would have written at a token --
  function texts(root) {
    const data = JSON.parse(root.querySelector("script").textContent), pop = root.querySelector(".pop");
    const tokens = [...root.querySelectorAll(".tok")];
    let current = null;

    function alternatives(title, list, here, colour) {
      const box = make("div");
      box.append(make("h5", "", title));
      const items = make("ul");
      for (const [text, shown, share] of list) {
        const item = make("li", text === here ? "here" : "");
        item.append(make("code", "", text), make("span", "", shown));
        const bar = make("i", colour);
        bar.style.width = 100 * share + "%";
        item.append(bar);
        items.append(item);
      }
      box.append(items);
      return box;
    }
    function show(token) {
      if (current === token) return;
      hide();
      current = token;
      token.classList.add("on");
      const [text, reverse, forward, p, q, mine, theirs] = data.tokens[+token.dataset.n];
      pop.replaceChildren(
        make("div", "word", text),
        make("p", "", "KL(model ‖ target) " + reverse + ", KL(target ‖ model) " + forward + " nats. This token: " + p + " for the model, " + q + " for " + data.target + "."));
      const two = make("div", "two");
      two.append(alternatives("The model", mine, text, "c1"), alternatives(data.target[0].toUpperCase() + data.target.slice(1), theirs, text, "c2"));
      pop.append(two);
      pop.hidden = false;
      const box = root.getBoundingClientRect(), line = token.getClientRects()[0] || token.getBoundingClientRect();
      const left = Math.max(0, Math.min(line.left - box.left - 20, box.width - pop.offsetWidth - 2));
      pop.style.left = left + "px";
      const below = line.bottom - box.top + 8, above = line.top - box.top - pop.offsetHeight - 8;
      pop.style.top = (line.bottom + pop.offsetHeight + 16 > window.innerHeight && line.top > pop.offsetHeight + 16 ? above : below) + "px";
    }
    function hide() {
      if (current) current.classList.remove("on");
      current = null;
      pop.hidden = true;
    }
    tokens.forEach((token, i) => {
      token.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(token); });
      token.addEventListener("focus", () => show(token));
      token.addEventListener("click", () => { show(token); token.focus({ preventScroll: true }); });
      token.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -i, End: tokens.length - 1 - i }[event.key];
        if (event.key === "Escape") return hide();
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); current = null; return show(token); }
        if (move === undefined) return;
        event.preventDefault();
        const next = tokens[Math.max(0, Math.min(tokens.length - 1, i + move))];
        tokens.forEach((t) => { t.tabIndex = t === next ? 0 : -1; });
        next.focus();
      });
    });
    root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    root.addEventListener("focusout", (event) => { if (!root.contains(event.relatedTarget)) hide(); });
    document.addEventListener("pointerdown", (event) => { if (!root.contains(event.target)) hide(); });
  }

  // -- commands: copying, where the browser allows it --
  function copying(button) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", () => {
      navigator.clipboard.writeText(button.parentNode.querySelector("pre").textContent).then(
        () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); },
        () => { button.textContent = "Not allowed"; });
    });
  }

  document.querySelectorAll(".plot").forEach(chart);
  document.querySelectorAll("[data-texts]").forEach(texts);
  document.querySelectorAll(".copy").forEach(copying);
})();
