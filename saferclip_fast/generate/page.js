"use strict";
// Shows a text when its button is pressed, and hides it again.
document.addEventListener("click", event => {
  const button = event.target.closest(".mask");
  if (!button) return;
  const shown = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", String(shown));
  button.textContent = shown ? button.dataset.text : "hidden: show text";
});
