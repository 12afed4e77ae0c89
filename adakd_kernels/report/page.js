"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  const hide = () => {
    if (shown) shown.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  };

  const place = () => {
    // Below the longest part of a token that stands on two lines; above it where the window ends.
    const at = [...shown.getClientRects()].reduce((best, part) => (part.width > best.width ? part : best));
    const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = at.bottom + 6;
    const fits = below + tip.offsetHeight <= document.documentElement.clientHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${fits ? below : at.top - tip.offsetHeight - 6}px`;
  };

  const show = (token) => {
    hide();
    shown = token;
    const { difficulty, temperature, rank, of, selected } = token.dataset;
    tip.textContent =
      `difficulty ${difficulty}\ntemperature ${temperature}\nrank ${rank} of ${of}\n` +
      (selected === "yes" ? "selected" : "not selected");
    token.setAttribute("aria-describedby", "tip");
    tip.hidden = false;
    place();
  };

  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".t") : null);
  const focused = () => (document.activeElement && document.activeElement.matches(".t") ? document.activeElement : null);

  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event) || focused();
    if (token) show(token);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (!token) return hide();
    // One stop of the Tab key for each text: the token that had the focus last.
    for (const other of token.parentElement.querySelectorAll(".t[tabindex='0']")) other.tabIndex = -1;
    token.tabIndex = 0;
    show(token);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => shown && place(), true);
  addEventListener("resize", () => shown && place());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const token = focused();
    if (!token) return;
    const tokens = [...token.parentElement.querySelectorAll(".t")];
    const here = tokens.indexOf(token);
    const to = {
      ArrowRight: here + 1,
      ArrowDown: here + 1,
      ArrowLeft: here - 1,
      ArrowUp: here - 1,
      Home: 0,
      End: tokens.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    tokens[Math.max(0, Math.min(tokens.length - 1, to))].focus();
  });
})();
