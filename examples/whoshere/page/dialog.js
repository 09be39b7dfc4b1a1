// The dialog for the user's own name and colour.

import { $, element } from "./elements.js";
import { PALETTE } from "./person.js";

function swatch(color, checked) {
  const input = element("input");
  input.type = "radio";
  input.name = "color";
  input.value = color;
  input.checked = checked;
  input.style.setProperty("--person", color);
  input.setAttribute("aria-label", `colour ${PALETTE.indexOf(color) + 1} of ${PALETTE.length}`);
  return input;
}

// startDialog sets it up. now() returns the user's current name and colour.
export function startDialog(me, now) {
  const dialog = $("me-dialog");
  $("edit-me").addEventListener("click", () => {
    const { name, color } = now();
    $("my-name").value = name;
    $("swatches").replaceChildren(...PALETTE.map((each) => swatch(each, each === color.toLowerCase())));
    dialog.showModal();
    $("my-name").select();
  });
  $("me-form").addEventListener("submit", (event) => {
    event.preventDefault();
    me.become($("my-name").value, $("me-form").elements.color.value || me.color);
    dialog.close();
  });
  $("me-cancel").addEventListener("click", () => dialog.close());
}
