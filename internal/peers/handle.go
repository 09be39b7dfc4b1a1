package peers

import (
	"context"
	"encoding/json"
	"time"
)

// callsAtOnce bounds the calls that are carried out here at once. More are not answered,
// and so are repeated.
const callsAtOnce = 64

// handleCall begins to carry out a call of another server.
func (p *Peers) handleCall(rest string) {
	call, ok := readCall(rest)
	if !ok {
		return
	}
	select {
	case p.slots <- struct{}{}:
	default:
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.remember(call.ID, time.Now())
	if p.stopped || seen.running {
		<-p.slots
		return
	}
	seen.running = true
	p.work.Go(func() {
		defer func() { <-p.slots }()
		p.executeAndAnswer(call, seen)
	})
}

// executeAndAnswer carries out a call, unless that has happened before, and answers it. A
// repeated call gets the same answer, and changes nothing.
func (p *Peers) executeAndAnswer(call Call, seen *recentCall) {
	ctx, cancel := context.WithTimeout(p.cfg.Life, CallLimit)
	defer cancel()
	if seen.answer == nil {
		result, err := p.cfg.Execute(ctx, call)
		seen.answer = &answer{ID: call.ID, Result: result}
		if err != nil {
			seen.answer.Error = nameOfError(err)
		}
	}
	body, _ := json.Marshal(seen.answer) // of strings, numbers and bools: it does not fail
	_, _ = p.cfg.Publish(ctx, p.cfg.Channel(call.From), wordDone+" "+string(body))
	p.mu.Lock()
	seen.running = false
	p.mu.Unlock()
}

// recentCall is a call that has come in before. Only the goroutine that has set running
// uses answer.
type recentCall struct {
	id      string
	at      time.Time
	running bool // guarded by Peers.mu
	answer  *answer
}

// remember returns the state of a call, which may be new, and forgets calls that no server repeats any
// more. The caller holds mu.
func (p *Peers) remember(id string, now time.Time) *recentCall {
	for len(p.order) > 0 && now.Sub(p.order[0].at) > 2*CallLimit {
		delete(p.seen, p.order[0].id)
		p.order = p.order[1:]
	}
	s := p.seen[id]
	if s == nil {
		s = &recentCall{id: id, at: now}
		p.seen[id] = s
		p.order = append(p.order, s)
	}
	return s
}

// handleAnswer passes an answer to the call that waits for it.
func (p *Peers) handleAnswer(rest string) {
	a, ok := readAnswer(rest)
	if !ok {
		return
	}
	p.mu.Lock()
	ch := p.waiting[a.ID]
	delete(p.waiting, a.ID)
	p.mu.Unlock()
	if ch != nil {
		ch <- a
	}
}
