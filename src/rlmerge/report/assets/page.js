// Draws the figures, in the reader's theme; draws them again where the theme changes.
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const paint = (text, line) => ({
    background: "transparent", font: "system-ui, sans-serif",
    axis: { labelColor: text, titleColor: text, tickColor: line, domainColor: line, gridColor: line, gridOpacity: 0.5 },
    legend: { labelColor: text, titleColor: text }, header: { labelColor: text, titleColor: text },
    title: { color: text }, text: { color: text }, view: { stroke: "transparent" },
  });
  let chosen = null, drawn = [], turn = 0, figures = {};
  const isDark = () => (chosen ? chosen === "dark" : system.matches);
  function dress() {
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "Light" : "Dark";
  }
  async function draw() {
    const mine = ++turn, dark = isDark();
    dress();
    const config = dark ? paint("#e8ecf1", "#5a6673") : paint("#1b1f24", "#b3bcc6");
    drawn.splice(0).forEach((one) => one.finalize());
    for (const [id, spec] of Object.entries(figures)) {
      const options = { mode: "vega-lite", renderer: "svg", actions: false, config, tooltip: { theme: dark ? "dark" : "light" } };
      const one = await window.vegaEmbed(document.getElementById(`chart-${id}`), spec, options);
      if (mine !== turn) { one.finalize(); return; }
      drawn.push(one);
    }
    root.dataset.drawn = String(drawn.length);
  }
  async function start() {
    dress();
    figures = JSON.parse(await unpack("figures"));
    const script = document.createElement("script");
    script.textContent = `(() => {${await unpack("library")}})();`;
    document.head.append(script);
    await draw();
  }
  const failed = () => { document.getElementById("failed").hidden = false; };
  button.addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; draw().catch(failed); });
  system.addEventListener("change", () => draw().catch(failed));
  document.getElementById("save").addEventListener("click", async () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await unpack("numbers")], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  start().catch((error) => { failed(); throw error; });
})();
