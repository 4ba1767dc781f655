// Draws the figures, in the reader's theme; draws them again where the theme changes.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const root = document.documentElement, button = document.getElementById("theme");
const system = window.matchMedia("(prefers-color-scheme: dark)");
const paint = (text, line) => ({
  background: "transparent", font: "system-ui, sans-serif",
  axis: { labelColor: text, titleColor: text, tickColor: line, domainColor: line, gridColor: line, gridOpacity: 0.5 },
  legend: { labelColor: text, titleColor: text }, header: { labelColor: text, titleColor: text },
  title: { color: text }, text: { color: text }, view: { stroke: "transparent" },
});
let chosen = null, drawn = [], turn = 0;
async function draw() {
  const dark = chosen ? chosen === "dark" : system.matches, mine = ++turn;
  root.dataset.theme = dark ? "dark" : "light";
  button.textContent = dark ? "Light" : "Dark";
  const config = dark ? paint("#e8ecf1", "#5a6673") : paint("#1b1f24", "#b3bcc6");
  drawn.splice(0).forEach((one) => one.finalize());
  for (const [id, spec] of Object.entries(figures)) {
    const place = document.getElementById(`chart-${id}`);
    const one = await vegaEmbed(place, spec, { renderer: "svg", actions: false, config, tooltip: { theme: dark ? "dark" : "light" } });
    if (mine !== turn) { one.finalize(); return; }
    drawn.push(one);
  }
  root.dataset.drawn = String(drawn.length);
}
button.addEventListener("click", () => { chosen = root.dataset.theme === "dark" ? "light" : "dark"; draw(); });
system.addEventListener("change", draw);
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([document.getElementById("numbers").textContent], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
draw();
