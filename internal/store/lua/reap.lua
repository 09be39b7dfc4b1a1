-- reap.lua: ends entries and states of others, each only on its ground. The
-- record is the claim: whoever takes it away tells, everybody else finds it gone.
--
-- KEYS[1] rooms index of the bucket, then seq of each room, in the order of their R, then members (R),
--   owned and fence (I), conn and state (items)
-- ARGV[1] random tag of the call, also of the epoch of rooms that have none  ARGV[2] prefix of event channels
-- ARGV[3] where the caller expects this clock (unix ms)  ARGV[4] tolerance (ms)  ARGV[5] how many rooms
--   then R, a room and whether it is tracked ('1': the caller has a rule for it), once in a call, and behind it its items: name conn entry stateVersion
--   An I, which is alone, says whose the items after it are.
--   Names are unique in the call and begin with the mode:
--   t: its per-connection key is gone;  s: its state's key is gone;  d: its owner is fenced;  f: no ground needed
--
-- Reply: 'CLOCK', or per item '+' ended now, 'a' the ground does not hold, '0' ended before, '! text'.

local batch, channels = args[1], args[2]
if math.abs(now - tonumber(args[3])) > tonumber(args[4]) then
  return 'CLOCK'
end

-- Not refused when Redis is out of memory, and after it nothing else is:
-- ending is always possible.
try('SREM', keys[1], '')

-- The incarnation at hand.
local ownedKey, fenceKey
local fenced -- nil: not asked for yet
local gone = {} -- names to be taken off its index

local function listed(conn, entry)
  return 'e ' .. conn .. ' ' .. entry .. ' ' .. room
end

local function unlist(conn, entry)
  gone[#gone + 1] = listed(conn, entry)
end

local function leaveIndex()
  spread('SREM', ownedKey, gone)
  gone = {}
end

local function dead()
  if fenced == nil then
    fenced = call('GET', fenceKey) == 'dead'
  end
  return fenced
end

-- mourn ends an entry of the dead incarnation at hand that is on its index and
-- whose record is lost: taking it off the index was the claim.
local function mourn(name, conn, entry, connKey, stateKey)
  call('DEL', connKey, stateKey)
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  farewell(conn, entry, ' ' .. match(ownedKey, '[^:]+$') .. ' ', batch .. name, 'd')
  return '+'
end

-- judge ends an entry of the room at hand, or its state.
local function judge(name, conn, entry, version, connKey, stateKey)
  local v = try('HGET', members, conn)
  if failed(v) then
    return '! ' .. v.err
  end
  local id, inc
  if v then
    id, inc = match(v, '^(%S+)( %S+ )')
  end
  if id ~= entry then
    if not v and sub(name, 1, 1) == 'd' and dead() and call('SREM', ownedKey, listed(conn, entry)) == 1 then
      return mourn(name, conn, entry, connKey, stateKey)
    end
    unlist(conn, entry)
    return '0'
  end
  local _, stop, ttl, _, sl, sv, meta, mv, ml, til, joined = find(v, REST, #entry + #inc + 1)
  if not stop then
    return '! ' .. ODD
  end
  local mode, cause = sub(name, 1, 1), 'l'
  if mode == 's' then
    if sl == '0' or sv ~= version then
      return '0'
    end
    if til == '0' or call('EXISTS', stateKey) == 1 then
      return 'a'
    end
  elseif mode == 't' then
    if ttl == '0' or call('EXISTS', connKey) == 1 then
      return 'a'
    end
    cause = 's'
  elseif mode == 'd' then
    if not dead() then
      return 'a'
    end
    cause = 'd'
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  if mode == 's' then
    advance(batch .. name)
    local who = entry .. inc .. ttl .. ' 0 ' .. sv .. ' . '
    local since = '0 ' .. joined .. ' ' .. seq .. '\n'
    call('HSET', members, conn, who .. meta .. since .. sub(v, stop + 1, stop + tonumber(ml)))
    call('DEL', stateKey)
    publish('S', '.', conn, who .. mv .. ' 0 ' .. since)
    return '+'
  end
  if ttl == '0' and sl == '0' then
    connKey = nil -- it has no keys of its own
  end
  remove(conn, entry, inc, connKey, stateKey, batch .. name, cause)
  unlist(conn, entry)
  return '+'
end

local total = tonumber(args[5])
readPositions(2, total)
local reply = {}

local function judgeAll()
  local ki, ai = 2 + total, 6
  while ai <= #args do
    if args[ai] == 'R' then
      enter(args[ai + 1], args[ai + 2], keys[ki], channels)
      ki, ai = ki + 1, ai + 3
    elseif args[ai] == 'I' then
      leaveIndex()
      ownedKey, fenceKey, fenced = keys[ki], keys[ki + 1], nil
      ki, ai = ki + 2, ai + 1
    else
      reply[#reply + 1] = judge(args[ai], args[ai + 1], args[ai + 2], args[ai + 3], keys[ki], keys[ki + 1])
      ki, ai = ki + 2, ai + 4
    end
  end
end

local stopped = attempt(judgeAll, keys[1])
leaveIndex()
return stopped or reply
