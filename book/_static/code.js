// One button at the head of a chapter that shows or hides all of its code.
document.addEventListener("DOMContentLoaded", () => {
  const cells = [...document.querySelectorAll("div.cell details.hide")];
  const title = document.querySelector("article h1");
  if (!cells.length || !title) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "lablog-code";
  const tell = () => {
    button.textContent = cells.every((cell) => cell.open) ? "Hide all code" : "Show all code";
  };
  button.addEventListener("click", () => {
    const open = !cells.every((cell) => cell.open);
    for (const cell of cells) cell.open = open;
    tell();
  });
  for (const cell of cells) cell.addEventListener("toggle", tell);
  tell();
  title.after(button);
});
