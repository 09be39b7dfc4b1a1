-- reap.lua: ends entries and states of others, each only on its ground. The
-- record is the claim: whoever takes it away tells, everybody else finds it gone.
--
-- KEYS[1] rooms index of the bucket, then per item: members, seq, conn, state, owned, fence (of the entry's incarnation)
-- ARGV[1] epoch for rooms that have none  ARGV[2] prefix of event channels
-- ARGV[3] where the caller expects this clock (unix ms)  ARGV[4] tolerance (ms)
--   then per item: mode room conn entry tag stateVersion
--   mode t: its per-connection key is gone;  s: its state's key is gone;  d: its owner is fenced;  f: no ground needed
--
-- Reply: 'CLOCK', or per item '+' ended now, 'a' the ground does not hold, '0' ended before, '! text'.

local epoch, channels = ARGV[1], ARGV[2]
if math.abs(now - tonumber(ARGV[3])) > tonumber(ARGV[4]) then
  return 'CLOCK'
end

-- Not refused when Redis is out of memory, and after it nothing else is:
-- ending is always possible.
redis.pcall('SREM', KEYS[1], '')

local function judge(k, mode, room, conn, entry, tag, version)
  local v = redis.pcall('HGET', k.members, conn)
  if type(v) == 'table' and v.err then
    return '! ' .. v.err
  end
  local r = v and decode(v)
  if not r or r.entry ~= entry then
    redis.call('SREM', k.owned, 'e ' .. conn .. ' ' .. entry .. ' ' .. room)
    return '0'
  end
  local channel = channels .. room
  if mode == 's' then
    if r.state == '' or r.sv ~= version then
      return '0'
    end
    if r.til == '0' or redis.call('EXISTS', k.state) == 1 then
      return 'a'
    end
    local err = dropState(k, conn, r, r.sv, epoch, tag, channel)
    return err and '! ' .. err or '+'
  end
  local cause = 'l'
  if mode == 't' then
    if r.ttl == '0' or redis.call('EXISTS', k.conn) == 1 then
      return 'a'
    end
    cause = 's'
  elseif mode == 'd' then
    if redis.call('GET', k.fence) ~= 'dead' then
      return 'a'
    end
    cause = 'd'
  end
  local err = remove(k, room, conn, r, epoch, tag, cause, channel)
  return err and '! ' .. err or '+'
end

local reply = {}
local ki = 2
for ai = 5, #ARGV, 6 do
  local k = {
    rooms = KEYS[1], members = KEYS[ki], seq = KEYS[ki + 1], conn = KEYS[ki + 2], state = KEYS[ki + 3],
    owned = KEYS[ki + 4], fence = KEYS[ki + 5],
  }
  reply[#reply + 1] = judge(k, ARGV[ai], ARGV[ai + 1], ARGV[ai + 2], ARGV[ai + 3], ARGV[ai + 4], ARGV[ai + 5])
  ki = ki + 6
end
return reply
