package browsertest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// watch runs in each page before its own scripts. It records the toasts, the rows that
// were removed from the list, and violations of the page's policy. It also defines
// functions for the tests.
const watch = `
window.seen = {toasts: [], gone: [], violations: [], asked: 0};
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (data) {
  if (data.includes("mesh/get-connection-metadata")) seen.asked++;
  return send.call(this, data);
};
addEventListener("securitypolicyviolation", (e) => seen.violations.push(e.violatedDirective + " " + e.blockedURI));
addEventListener("DOMContentLoaded", () => {
  const observe = (id, note) => new MutationObserver((changes) => changes.forEach(note))
    .observe(document.getElementById(id), {childList: true});
  observe("toasts", ({addedNodes}) => addedNodes.forEach((el) =>
    seen.toasts.push({kind: el.dataset.kind, text: el.querySelector(".text").textContent})));
  observe("people", ({removedNodes}) => removedNodes.forEach((el) =>
    el.isConnected || seen.gone.push({name: el.querySelector(".name").textContent, at: Date.now()})));
});
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const rows = (name) => all("#people li").filter((el) => el.querySelector(".name").textContent === name);
const cursors = (name) => all(".cursor:not(.gone)").filter((el) => el.querySelector(".label").textContent === name);
const toasts = (kind, name) => seen.toasts.filter((toast) => toast.kind === kind && toast.text.split(/ and | /).includes(name)).length;
const status = () => document.getElementById("status").dataset.status;
const text = (id) => document.getElementById(id).textContent;
// inArea and tip return a position in the shared area: of a point of the screen, and of a cursor.
const inArea = (x, y) => {
  const box = document.getElementById("cursors").getBoundingClientRect();
  return [(x - box.left) / box.width, (y - box.top) / box.height];
};
const tip = (name) => {
  const [cursor] = cursors(name);
  if (cursor === undefined) return null;
  const box = cursor.getBoundingClientRect();
  return inArea(box.left, box.top);
};
const near = (point, x, y) => point !== null && Math.abs(point[0] - x) < 0.005 && Math.abs(point[1] - y) < 0.005;`

// tab is one tab with the page.
type tab struct {
	t     testing.TB
	ctx   context.Context
	close context.CancelFunc
	name  string

	mu     sync.Mutex
	faults []string // guarded by mu: console messages, and requests to other servers
}

// view is a screen.
type view struct {
	width, height int64
	mobile, dark  bool
}

var (
	desktop = view{width: 1280, height: 800}
	smaller = view{width: 1000, height: 700}
	phone   = view{width: 390, height: 844, mobile: true}
)

// open opens the page in a new tab and returns when the room is live.
func (b *browser) open(t testing.TB, name, url string, v view) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(b.ctx)
	p := &tab{t: t, ctx: ctx, close: cancel, name: name}
	t.Cleanup(cancel)
	origin := url[:strings.Index(url, "/?")]
	// The first Run must not have a deadline: the tab would end with it.
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("%s: new tab: %v", name, err)
	}
	if err := chromedp.Listen(ctx, func(event any) { p.hear(origin, event) }); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	scheme := "light"
	if v.dark {
		scheme = "dark"
	}
	p.run(
		call(cdplog.Enable, cdp.Empty{}),
		call(network.Enable, network.EnableParams{}),
		call(page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: watch}),
		call(emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
			Width: v.width, Height: v.height, DeviceScaleFactor: 1, Mobile: v.mobile,
		}),
		call(emulation.SetTouchEmulationEnabled, emulation.SetTouchEmulationEnabledParams{Enabled: v.mobile}),
		call(emulation.SetFocusEmulationEnabled, emulation.SetFocusEmulationEnabledParams{Enabled: true}),
		call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
		}),
		chromedp.Navigate(url),
	)
	p.await(`status() === "live" && all("#people .mine").length === 1`)
	return p
}

// rename gives the tab's user another name, by keyboard alone.
func (p *tab) rename(name string) {
	p.t.Helper()
	get[bool](p, `document.getElementById("edit-me").focus() ?? true`)
	p.run(chromedp.KeyEvent("\r"))
	p.await(`document.getElementById("me-dialog").open && document.activeElement.id === "my-name"`)
	p.shot("dialog")
	p.run(chromedp.KeyEvent(name), chromedp.KeyEvent("\r"))
	p.await(fmt.Sprintf(`!document.getElementById("me-dialog").open && all("#people .mine .name")[0]?.textContent === %q`, name))
}

// hear records events that must not happen in any page.
func (p *tab) hear(origin string, event any) {
	switch e := event.(type) {
	case *runtime.EventConsoleAPICalled:
		var args []string
		for _, a := range e.Args {
			args = append(args, string(a.Value)+a.Description)
		}
		p.fault("console.%s: %s", e.Type, strings.Join(args, " "))
	case *runtime.EventExceptionThrown:
		p.fault("exception: %v", e.ExceptionDetails)
	case *cdplog.EventEntryAdded:
		p.fault("%s %s: %s %s", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL)
	case *network.EventRequestWillBeSent:
		if !strings.HasPrefix(e.Request.URL, origin+"/") {
			p.fault("request to %s", e.Request.URL)
		}
	}
}

func (p *tab) fault(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, fmt.Sprintf(format, args...))
}

// clean fails the test if such an event was recorded. Failed connections are expected of
// a page whose server was away.
func (p *tab) clean(serverWasAway bool) {
	p.t.Helper()
	p.mu.Lock()
	faults := slices.Clone(p.faults)
	p.mu.Unlock()
	for _, fault := range faults {
		if serverWasAway && strings.Contains(fault, "WebSocket connection to") {
			continue
		}
		p.t.Errorf("%s: %s", p.name, fault)
	}
	p.mu.Lock()
	p.faults = nil // reported
	p.mu.Unlock()
	for _, violation := range get[[]string](p, `seen.violations`) {
		p.t.Errorf("%s: policy violated: %s", p.name, violation)
	}
}

// call is an action that is one command of the DevTools protocol.
func call[P, R any](command cdp.Command[P, R], params P) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, target *chromedp.Target) error {
		_, err := cdp.Call(ctx, target, command, params)
		return err
	})
}

// run executes actions in the tab.
func (p *tab) run(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, timeLimit)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

// get evaluates an expression in the page.
func get[T any](p *tab, expression string) T {
	p.t.Helper()
	return evaluate(p, chromedp.Evaluate[T](expression))
}

// evaluate runs an action that has a result.
func evaluate[T any](p *tab, action chromedp.Action[T]) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, timeLimit)
	defer cancel()
	v, err := chromedp.Run(ctx, action)
	if err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
	return v
}

// await waits until an expression is true.
func (p *tab) await(condition string) {
	p.t.Helper()
	p.awaitWhile(func() {}, condition)
}

// awaitWhile waits until an expression is true. The expression depends on something that
// does not last, so again repeats it until then.
func (p *tab) awaitWhile(again func(), condition string) {
	p.t.Helper()
	const pause, rounds = 50 * time.Millisecond, 20
	deadline := time.Now().Add(timeLimit)
	for i := 0; ; i++ {
		if i%rounds == 0 {
			again()
		}
		if get[bool](p, condition) {
			return
		}
		if time.Now().After(deadline) {
			p.shot("failed")
			p.t.Fatalf("%s: not within %v: %s\nthe page:\n%s", p.name, timeLimit, condition, get[string](p, `document.body.innerText`))
		}
		time.Sleep(pause)
	}
}

// shot takes a screenshot into the directory of -shots, if it is given.
func (p *tab) shot(name string) {
	p.t.Helper()
	if *shotsFlag == "" {
		return
	}
	png := evaluate(p, chromedp.CaptureScreenshot())
	if err := os.WriteFile(filepath.Join(*shotsFlag, name+".png"), png, 0o644); err != nil {
		p.t.Fatal(err)
	}
}
